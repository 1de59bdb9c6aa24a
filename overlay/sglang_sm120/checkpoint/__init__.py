"""What a published DeepSeek-V4 checkpoint holds: its `config.json` (`config`) and its tensors (`layout`)."""
