"""The only place that knows OpenRLHF, Ray, DeepSpeed and vLLM. Start reading at `seams.py`."""
