"""The only place that knows OpenRLHF, Ray, DeepSpeed and vLLM. Start reading at `doors.py`, then `hooks.py`."""
