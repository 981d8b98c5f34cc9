"""Write a model as one GGUF file, for llama.cpp."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.export.gguf_architectures import ARCHITECTURES, Architecture, context_length, rope_tensors
from engine.export.gguf_errors import UnsupportedModel
from engine.export.gguf_tokenizer import write_tokenizer
from engine.export.saved_models import max_magnitude
from utils import UserError, progress

OUTTYPES = {
    "f32": (TensorType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (TensorType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (TensorType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (TensorType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (TensorType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
QUANTISED_TYPES = (TensorType.Q8_0, TensorType.Q4_0)
BLOCK_SIZE = 32  # weights of a row with one common scale, in q8_0 and q4_0
MAX_FLOAT16 = 65504.0


# ---- Tensors ----


@dataclass
class PlannedTensor:
    """A tensor of the file, computed when it is written.

    Args:
        name: in llama.cpp.
        type: the stored type.
        compute: returns the value in float32, in llama.cpp's layout.
        shape: of that value.
    """

    name: str
    type: TensorType
    compute: Callable[[], np.ndarray]
    shape: tuple[int, ...]


def _plan_tensors(model: PreTrainedModel, architecture: Architecture, outtype: str) -> list[PlannedTensor]:
    config = model.config
    names = gguf.get_tensor_name_map(architecture.name, config.num_hidden_layers)
    wanted = OUTTYPES[outtype][0]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = embedding.data_ptr() == head.data_ptr()
    plan = []
    for source, weight in model.state_dict().items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModel(f"llama.cpp has no tensor for {source}")
        if name == "output.weight" and is_tied and not architecture.needs_output:
            continue
        shape = tuple(architecture.convert(source, weight, config).shape)  # converted again on writing, to save memory
        _check_range(source, weight, wanted)
        plan.append(
            PlannedTensor(
                name,
                _tensor_type(name, shape, wanted, is_tied and not architecture.needs_output),
                lambda source=source, weight=weight: (  # type: ignore[misc]
                    architecture.convert(source, weight, config).float().contiguous().cpu().numpy()
                ),
                shape,
            )
        )
    for name, array in rope_tensors(config).items():
        plan.append(PlannedTensor(name, TensorType.F32, lambda array=array: array, array.shape))  # type: ignore[misc]
    if wanted in QUANTISED_TYPES and not any(tensor.type is wanted for tensor in plan):
        lengths = sorted({tensor.shape[-1] for tensor in plan if len(tensor.shape) > 1})
        rows = ", ".join(map(str, lengths))
        raise UnsupportedModel(f"no row length ({rows}) is a multiple of the block size {BLOCK_SIZE}")
    return plan


def _tensor_type(name: str, shape: tuple[int, ...], wanted: TensorType, is_tied: bool) -> TensorType:
    """The stored type of a tensor.

    llama.cpp's converter and quantizer choose the same, with one exception: Q8_0 stands here for Q6_K.
    """
    if len(shape) == 1 or "_norm." in name or name == "position_embd.weight":
        return TensorType.F32
    if wanted in QUANTISED_TYPES and shape[-1] % BLOCK_SIZE:
        return TensorType.F16
    if wanted is TensorType.Q4_0 and (name == "output.weight" or (is_tied and name == "token_embd.weight")):
        return TensorType.Q8_0
    return wanted


def _check_range(name: str, weight: Tensor, wanted: TensorType) -> None:
    value = max_magnitude(weight)
    if not math.isfinite(value):
        raise UserError("NONFINITE", f"format=gguf: {name} contains NaN or Inf", "export another checkpoint")
    if wanted not in (TensorType.F32, TensorType.BF16) and value > MAX_FLOAT16:
        raise UnsupportedModel(f"{name} contains {value:.3g}, above float16's maximum: set dtype=bf16 or f32")


# ---- The file ----


@dataclass
class GGUFPlan:
    """The complete description of a GGUF file, ready to be written.

    Args:
        writer: has the metadata and the tensors' names, types and shapes.
        notes: lines for the user.
    """

    writer: gguf.GGUFWriter
    tensors: list[PlannedTensor]
    notes: list[str]

    def write(self, path: Path) -> None:
        """Write the file, one tensor at a time."""
        try:
            self.writer.write_header_to_file(path)
            self.writer.write_kv_data_to_file()
            self.writer.write_ti_data_to_file()
            for tensor in progress(self.tensors, description="writing GGUF", unit="tensors"):
                self.writer.write_tensor_data(gguf.quants.quantize(tensor.compute(), tensor.type))
        finally:
            self.writer.close()


def plan_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, outtype: str, *, name: str, chat_template: Any = None
) -> GGUFPlan:
    """Decide all contents of a GGUF file, and refuse unsupported models before anything is written.

    Args:
        outtype: a key of OUTTYPES. Vectors stay in f32. Rows of a length that BLOCK_SIZE does not divide stay in f16.
        name: of the model.
        chat_template: Jinja text, a dict of name to Jinja text, or None.

    Raises:
        UserError: CONFIG if llama.cpp cannot represent the model, NONFINITE if a weight is NaN or Inf.
    """
    try:
        architecture = ARCHITECTURES.get(model.config.model_type)
        if architecture is None:
            raise UnsupportedModel(f"{model.config.model_type} is not one of {', '.join(ARCHITECTURES)}")
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.name])
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        architecture.write(writer, model.config)
        writer.add_file_type(OUTTYPES[outtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = write_tokenizer(writer, model, tokenizer, chat_template)
        tensors = _plan_tensors(model, architecture, outtype)
    except UnsupportedModel as error:
        raise UserError(
            "CONFIG", f"format=gguf dtype={outtype} cannot represent this model: {error}", "use format=hf"
        ) from error
    notes += _notes(model, tensors, outtype)
    for tensor in tensors:
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=tensor.type)
    return GGUFPlan(writer, tensors, notes)


def _notes(model: PreTrainedModel, tensors: list[PlannedTensor], outtype: str) -> Iterator[str]:
    config, wanted = model.config, OUTTYPES[outtype][0]
    if hasattr(config, "rope_parameters") and config.model_type != "gpt_neox":
        length = context_length(config)
        if length < config.max_position_embeddings:
            yield f"context_length is {length}, the sliding window: llama.cpp's full attention equals it so far"
    kept = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.type is TensorType.F16 is not wanted]
    if kept:
        names = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
        yield f"{len(kept)} tensors stay in f16, as their row length is no multiple of {BLOCK_SIZE}: {names}"
