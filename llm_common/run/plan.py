"""What a run will use on a device, decided once, before anything long begins."""

from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")  # the Kernels of a framework


@dataclass(frozen=True)
class Plan(Generic[K]):
    """`str` of a plan is the line for people; everything else reads the fields."""

    device_kind: str  # what the device calls itself
    platform: str  # "cpu", "gpu", "tpu" or "mps"
    dtype: str  # of the computation
    attention: str  # which kernel: "reference", "xla", "cudnn", "splash" or "sdpa"
    attention_note: str  # why it is not the fastest one, or what else stands in for it; "" if there is nothing to say
    keeps_scores: bool  # whether the backward pass keeps attention's scores, T x T for each head
    compiler: str  # "jit" or "torch.compile"; "" if the step runs operation by operation
    layers: str  # "scanned" or "unrolled"; "" where there is no choice
    remat: str
    document_mask: bool
    deterministic: bool
    kernels: K  # what the model is given

    @property
    def compiled(self) -> bool:
        return bool(self.compiler)

    def __str__(self) -> str:
        note = f" ({self.attention_note})" if self.attention_note else ""
        layers = f", layers {self.layers}" if self.compiled and self.layers else ""
        parts = [
            f"{self.device_kind}, {self.dtype}, {self.attention} attention{note}",
            f"{self.compiler or 'not compiled'}{layers}",
            f"remat {self.remat}",
            "document mask" if self.document_mask else "",
            "deterministic" if self.deterministic else "",
        ]
        return ", ".join(part for part in parts if part)
