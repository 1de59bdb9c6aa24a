"""`sglang-sm120`: plans SGLang's settings for DeepSeek-V4 on a machine, says why, starts the server, watches it."""
