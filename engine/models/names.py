"""Where a parameter lies in a checkpoint: one entry of a model's name table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of the checkpoint, or an equal part of its rows.

    Attributes:
        name: The tensor's name; `*` stands for the layer's number. Where the parameter holds all
            experts of a layer, each of them is a tensor, and `#` stands for its number.
        part: Which part of the rows, where several parameters are fused into one tensor.
        num_parts: How many equal parts the tensor has.
    """

    name: str
    part: int = 0
    num_parts: int = 1
