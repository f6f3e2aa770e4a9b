"""What is special to CUDA: varlen attention, CUDA graphs, and the same answers as on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor import llama_decoder
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.cuda_graphs import _StaticStep, buckets, decode_input, extent_of_two
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.executor.kernels.selection import LayerShape, decode_kernel, layer_kernels, top_p_kernel
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.varlen import available
from llava_serve.errors import NumericalError
from llava_serve.llm import LLM
from llava_serve.sampling_params import SamplingParams
from support.demo import DEMO_ANSWER, DEMO_IMAGE, DEMO_QUESTION
from support.paths import CHECKPOINTS
from support.tiny_engine import TinyModel

TINY = CHECKPOINTS / "llava-v1.5-tiny"
SHORT = "\nAnswer the question using a single word or phrase."
GREEDY = SamplingParams(temperature=0)
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def attended(device: str, dtype: torch.dtype, window: int | None = None, *, biased: bool = False) -> torch.Tensor:
    """A step of a prompt's second chunk and two decoding sequences, over a KV pool of random content."""
    generator = torch.Generator().manual_seed(0)
    memory = KVPool(1, KV_HEADS, 256, HEAD_DIM, dtype, torch.device(device))
    for half in memory.layers[0]:
        half.copy_(torch.randn(half.shape, generator=generator))
    sequences = [PackedSequence(0, 1, 160, 30), PackedSequence(1, 1, 0, 99), PackedSequence(2, 20, 112, 12)]
    query = torch.randn(1, HEADS, 22, HEAD_DIM, generator=generator).to(device, dtype)
    key, value = (torch.randn(1, KV_HEADS, 22, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(2))
    step = PackedStep(memory, sequences, dtype, torch.device(device))
    if not biased:
        return step.attend(0, query, key, value, None, window).float().cpu()
    slopes = torch.linspace(0.1, 0.8, KV_HEADS, device=device)
    return step.attend(0, query[:, :KV_HEADS], key, value, None, slopes=slopes).float().cpu()


def test_varlen_attention_is_not_available_on_a_cpu_or_in_full_precision() -> None:
    assert not available(torch.device("cpu"), torch.bfloat16, KV_HEADS, HEAD_DIM)
    assert not available(torch.device("cuda"), torch.float32, KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nan_left_in_the_kv_pool_does_not_change_later_answers(device: str) -> None:
    """Kernels read whole tiles: what is behind a sequence's end must not count, whatever it is."""
    llm = LLM(str(TINY), device=device, dtype="bfloat16", engine=EngineOptions(prefix_caching=False))
    sampling = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    expected = llm.generate(["Why?", "Who?"], sampling=sampling)
    ill = llm.processor.prepare_query("What is this, in so many words as you can say? 7")
    weight = llm.engine.model.language_model.get_input_embeddings().weight.data
    (poison, *_) = set(ill.token_ids.tolist()) - {
        token for one in expected for token in (*one.input_ids, *one.token_ids)
    }
    weight[poison] = torch.nan
    for _ in range(3):
        with pytest.raises(NumericalError, match="bfloat16"):
            llm.run([ill], sampling)
        assert [one.token_ids for one in llm.generate(["Why?", "Who?"], sampling=sampling)] == [
            one.token_ids for one in expected
        ]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_attention_equals_plain_attention(dtype: torch.dtype, window: int | None) -> None:
    assert available(torch.device("cuda"), dtype, KV_HEADS, HEAD_DIM)
    torch.testing.assert_close(
        attended("cuda", dtype, window), attended("cpu", torch.float32, window), atol=2e-2, rtol=2e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_without_the_varlen_kernel_gives_the_same(
    dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_serve.engine.executor.varlen.available", lambda *_: False)
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    expected = attended("cpu", torch.float32, biased=biased)
    torch.testing.assert_close(attended("cuda", dtype, biased=biased), expected, **close)


def test_every_batch_has_a_bucket_and_its_padding_touches_no_sequence() -> None:
    assert buckets(1) == [1]
    assert buckets(20) == [1, 2, 4, 8, 16, 20]
    sequences = [PackedSequence(0, 1, 160, 30), PackedSequence(1, 1, 0, 99)]
    numbers = decode_input([7, 9], sequences, batch_size=4, padding_position=256)
    assert numbers.tolist() == [[7, 9, 0, 0], [30, 99, 0, 0], [160, 0, 256, 256]]


@pytest.mark.gpu
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("kv_heads", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_kernel_is_used(dtype: torch.dtype, kv_heads: int, float8: bool) -> None:
    shape = LayerShape(4096, 11008, 32, kv_heads, 128, dtype, torch.device("cuda"), float8)
    kernels = layer_kernels(shape)
    assert kernels.add_rmsnorm is not twins.add_rmsnorm
    assert kernels.rotate_and_write is not twins.rotate_and_write
    assert kernels.silu_mul is not twins.silu_mul
    assert decode_kernel(shape, 16, alibi=False)
    assert decode_kernel(shape, 16, alibi=True)
    assert top_p_kernel(torch.float32, shape.device)


@pytest.mark.parametrize(
    ("kind", "page_size", "float8"),
    [
        *(("llama", 16, False), ("mistral", 4, False), ("qwen2", 1, False), ("mpt", 16, False), ("qwen3", 4, False)),
        *(("mistral", 4, True), ("mpt", 16, True), ("qwen3", 4, True)),
    ],
)
def test_a_step_of_graphs_over_pages_is_a_step_over_extents(
    kind: str, page_size: int, float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel's twin, which runs on a CPU, and padding."""
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})
    model = TinyModel(kind)
    config = model.language_model.config
    kv_heads, head_dim = getattr(config, "num_key_value_heads", 4), getattr(config, "head_dim", None) or 8
    decoder = Decoder(model.language_model, float8=float8)
    scales = torch.exp2(torch.arange(4.0 * kv_heads) % 3).view(2, 2, kv_heads) if float8 else None
    pools = []
    for _ in range(2):
        pools.append(KVPool(2, kv_heads, 65, head_dim, torch.float64, torch.device("cpu"), scales))
        filled = torch.empty(pools[-1]._memory.shape).normal_(generator=torch.Generator().manual_seed(0))
        pools[-1]._memory.copy_(filled)
    sequences = [PackedSequence(0, 1, 32, 17), PackedSequence(1, 1, 0, 30), PackedSequence(2, 1, 16, 0)]
    tokens = [7, 9, 11]
    padded, positions, bases = decode_input(tokens, sequences, 4, 64)
    steps = (
        (tokens, PackedStep(pools[0], sequences, torch.float64, torch.device("cpu"))),
        (padded.tolist(), _StaticStep(pools[1], positions, bases, 40, page_size, twins.decode_attention)),
    )
    with torch.inference_mode():
        packed, static = (decoder.forward(model.embed(torch.tensor(ids)), step) for ids, step in steps)
    torch.testing.assert_close(static[:3], packed, rtol=0, atol=1e-9)
    stored = [pool._memory[..., :64, :].double() for pool in pools]
    torch.testing.assert_close(stored[1], stored[0], rtol=0, atol=1e-9)


def test_an_extent_of_two_positions_is_whole_pages() -> None:
    assert [extent_of_two(page_size) for page_size in (1, 2, 16)] == [2, 2, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_cuda_graphs_answer_as_their_kernels_do(batch_size: int, kv_cache_dtype: Any) -> None:
    texts = []
    for cuda_graphs in (False, True):
        options = EngineOptions(max_num_seqs=8, cuda_graphs=cuda_graphs, kv_cache_dtype=kv_cache_dtype)
        llm = LLM("builtin", device="cuda", dtype="bfloat16", engine=options)
        assert (llm.engine._runner._graphs is not None) == cuda_graphs
        # of different lengths, so that sequences leave the batch one after the other
        questions = ["What is in the picture?", DEMO_QUESTION, f"{DEMO_QUESTION}{SHORT}", "How many shapes are there?"]
        questions = (questions * batch_size)[:batch_size]
        answers = llm.generate(questions, images=[[DEMO_IMAGE]] * batch_size, sampling=GREEDY)
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1]
    assert DEMO_ANSWER in " ".join(texts[0])


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_steps_launched_ahead_answer_as_others_do(cuda_graphs: bool) -> None:
    """Sequences that end at different times, greedy and sampled, with a prompt more than there are places."""
    llm = LLM("builtin", device="cuda", dtype="float32", engine=EngineOptions(max_num_seqs=3, cuda_graphs=cuda_graphs))
    assert llm.engine._pipeline.ahead
    questions = ["What is in the picture?", DEMO_QUESTION, f"{DEMO_QUESTION}{SHORT}", "How many shapes are there?"]
    for sampling in (GREEDY, SamplingParams(temperature=0.7, top_k=20, seed=1, logprobs=1)):
        found = []
        for ahead in (True, False):
            llm.engine._pipeline.ahead = ahead
            results = llm.generate(questions, images=[[DEMO_IMAGE]] * 4, sampling=sampling)
            found.append([(result.token_ids, result.finish_reason) for result in results])
        assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_builtin_model_answers_on_cuda_as_on_a_cpu(dtype: Any) -> None:
    llm = LLM("builtin", device="cuda", dtype=dtype)
    assert DEMO_ANSWER in llm.generate(DEMO_QUESTION, images=[DEMO_IMAGE], sampling=GREEDY).text
