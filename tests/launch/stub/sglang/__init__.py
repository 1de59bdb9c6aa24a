"""Stands in for SGLang where a test is about the launcher's handling of processes, which a real start takes minutes
to reach: `python -m sglang.launch_server` here has SGLang's processes, endpoints and manners, and no model."""
