"""Captured decode steps give what eager ones give, bit for bit, by a stand-in that replays noted operations."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from small_models import CONFIGS  # noqa: E402
from tape import Tapes  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

from runtime import offload  # noqa: E402
from runtime.copier import CopierError  # noqa: E402
from runtime.graphs import Graphs  # noqa: E402
from sim.spec import SpecError  # noqa: E402

SLIDING = {"gpt_oss": "StaticSlidingWindowLayer", "jamba": "Layer"}
POLICY = "speculative:guard=0,trust=0"


def offloaded(directory: Path, **options):
    given = {"bits": 4, "slots": 2, "policy": POLICY, "optimize": False, "progress": False, "link_gb_s": 1}
    return offload(directory, **given | options)


class Capturing(Tapes):
    """Transformers asks whether CUDA captures; here: whether the tape runs."""

    def graph(self):
        graph = super().graph()
        begin, end = graph.begin, graph.end

        def on() -> None:
            self._patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
            begin()

        def off() -> None:
            self._patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: False)
            end()

        graph.begin, graph.end = on, off
        return graph


def generated(model, batch: int, tokens: int = 8):
    """Tokens and every pass's logits, greedy, the first of several sequences padded; a static cache."""
    ids = torch.randint(3, 60, (batch, 6), generator=torch.Generator().manual_seed(batch)).to(model.device)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SLIDING])
def test_replayed_steps_are_the_eager_ones_bit_for_bit(saved, monkeypatch, name):
    """Alone and in a padded batch; a second call has another cache, and captures anew."""
    model = offloaded(saved(name))
    expected = {batch: generated(model, batch) for batch in (1, 3)}
    graphs = Graphs(model, model.offloaded.executor, Capturing(monkeypatch))
    for batch in (1, 3, 1):
        before = graphs.captured, graphs.replayed
        tokens, logits = generated(model, batch)
        assert torch.equal(tokens, expected[batch][0]) and torch.equal(logits, expected[batch][1])
        assert (graphs.captured - before[0], graphs.replayed - before[1]) == (1, 5), graphs.refused
    assert not graphs.refused
    stats = model.offload_stats()
    assert stats["misses"] > 0 and stats["hits"] + stats["late"] + stats["misses"] == stats["accesses"]
    model.offload_close()


def test_of_every_layer_one_graph_is_replayed_before_its_visit(saved, monkeypatch):
    model = offloaded(saved("mixtral"))
    executor, maker = model.offloaded.executor, Capturing(monkeypatch)
    Graphs(model, executor, maker)
    meet = executor.meet
    monkeypatch.setattr(executor, "meet", lambda *args: (maker.log.append(f"visit {args[0]}"), meet(*args))[1])
    generated(model, 1, tokens=5)
    replayed = [word for layer in range(3) for word in ("replay", f"visit {layer}")] + ["replay"]
    assert maker.log[-14:] == replayed * 2
    warm = [word for word in maker.log[:-14] if not word.startswith("noted")]
    assert warm == [*[f"visit {layer}" for layer in range(3)], "around"] * 1 + [
        *[f"visit {layer}" for layer in range(3)],
        "around",
        *replayed,
    ]
    assert sum(word.startswith("noted") for word in maker.log) == 4
    model.offload_close()


@pytest.mark.parametrize("name", SLIDING)
def test_caches_that_keep_count_on_the_host_run_as_ever(saved, monkeypatch, name):
    model = offloaded(saved(name))
    expected = generated(model, 1)
    graphs = Graphs(model, model.offloaded.executor, Capturing(monkeypatch))
    tokens, logits = generated(model, 1)
    assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    assert graphs.captured == 0 and SLIDING[name] in graphs.refused
    model.offload_close()


def test_other_passes_run_as_ever(saved, monkeypatch):
    """Without a static cache, with hidden states asked for, by position: nothing is captured, nothing is wrong."""
    model = offloaded(saved("mixtral"))
    ids = torch.tensor([[5, 17, 3]])
    with torch.inference_mode():
        expected = model(ids, use_cache=True)
        following = model(input_ids=ids[:, :1], past_key_values=expected.past_key_values, output_hidden_states=True)
    graphs = Graphs(model, model.offloaded.executor, Capturing(monkeypatch))
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, expected.logits)
        for _ in range(3):
            cache = transformers.StaticCache(model.config, max_cache_len=8)
            model(ids, past_key_values=cache)
            for _ in range(4):
                length = int(cache.get_seq_length())
                seen = model(input_ids=ids[:, :1], past_key_values=cache, output_hidden_states=True)
                assert len(seen.hidden_states) == len(following.hidden_states)
                assert int(cache.get_seq_length()) == length + 1
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert (graphs.captured, graphs.replayed) == (0, 0)
    assert "DynamicCache" in graphs.refused
    model.offload_close()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_refused_capture_is_undone_and_said_once(saved, monkeypatch, layer):
    """The host reads a value in a layer's attention: before the first visit, or after two of them."""
    model = offloaded(saved("mixtral"), record=True)
    expected = generated(model, 1)

    def read(module, args, kwargs) -> None:
        assert kwargs["hidden_states"].sum().item() < 1e9

    model.model.layers[layer].self_attn.register_forward_pre_hook(read, with_kwargs=True)
    graphs = Graphs(model, model.offloaded.executor, Capturing(monkeypatch))
    with pytest.warns(UserWarning, match=r"cannot be captured \(operation not permitted .*without graphs") as said:
        tokens, logits = generated(model, 1)
    assert len([w for w in said if "captured" in str(w.message)]) == 1
    assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    assert graphs.captured == graphs.replayed == 0
    trace = model.offloaded.executor.recorder.trace({}, "router")
    assert trace.sequence_lengths.tolist() == [13, 13]
    model.offload_close()


@pytest.mark.parametrize("step", [3, 6])
def test_an_error_in_a_visit_is_no_refusal(saved, monkeypatch, step):
    """In the captured step and in a replay: it is raised, and the model goes on being usable."""
    model = offloaded(saved("mixtral"))
    expected = generated(model, 1)
    executor = model.offloaded.executor
    graphs = Graphs(model, executor, Capturing(monkeypatch))
    meet, count = executor.meet, [0]

    def failing(layer, looked):
        count[0] += layer == 2
        if layer == 2 and count[0] == step:
            raise CopierError("the copier is tired")
        return meet(layer, looked)

    monkeypatch.setattr(executor, "meet", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CopierError, match="tired"):
            generated(model, 1)
        tokens, logits = generated(model, 1)
    assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])
    assert graphs.replayed >= 5
    model.offload_close()


def test_graphs_are_let_go_with_their_cache(saved, monkeypatch):
    model = offloaded(saved("mixtral"))
    graphs = Graphs(model, model.offloaded.executor, Capturing(monkeypatch))
    generated(model, 1)
    assert graphs.captured == 1 and not graphs._steps
    model.offload_close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_on_a_gpu_replayed_steps_are_the_eager_ones(saved, tmp_path, name):
    """Those of gpt-oss run as ever: its cache slides."""
    found = []
    for graphs in (False, True):
        model = offloaded(saved(name), store=tmp_path / "store", device="cuda", link_gb_s=None, graphs=graphs)
        found.append([generated(model, batch) for batch in (1, 3)])
        counts = model.offload_stats()["graphs"]
        assert not graphs or counts["replayed"] == (0 if name == "gpt_oss" else 10), counts
        model.offload_close()
    for (tokens, logits), (expected, eager) in zip(*found, strict=True):
        assert torch.equal(tokens, expected) and torch.equal(logits, eager)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_cuda_they_are_refused(saved):
    with pytest.raises(SpecError, match="graphs are CUDA's, and device=cpu has none; leave graphs out"):
        offloaded(saved("mixtral"), graphs=True)
    with pytest.raises(SpecError, match="router logits are recorded by hooks, which do not run in a graph"):
        offloaded(saved("mixtral"), graphs=True, record_logits=True)
