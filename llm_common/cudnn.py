"""What cuDNN's attention takes, which both frameworks call on an NVIDIA GPU; without it a slower kernel does
the work.
"""

from llm_common.config import ModelConfig


def why_not_cudnn(cfg: ModelConfig, compute_dtype: str, seq_len: int) -> str:
    """Why cuDNN's attention does not take a model with this dtype and sequence length, for people; "" if it does.

    seq_len 0: for decoding, one query at a time. Measured with cuDNN 9 through jax 0.11 and torch 2.11.
    """
    if compute_dtype != "bfloat16":
        return f"it takes bfloat16, not {compute_dtype}"
    if cfg.head_dim % 8 or cfg.head_dim > 128:
        return f"it takes a head_dim of a multiple of 8 up to 128, not {cfg.head_dim}"
    if seq_len % 2:
        return f"it trains on an even seq_len, not {seq_len}"
    return ""
