"""Offloaded, every family computes bit for bit what it computes with every expert resident."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
pytest.importorskip("transformers", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from small_models import CONFIGS  # noqa: E402

from runtime import models, offload  # noqa: E402

POLICIES = ("speculative:guard=0,trust=0", "on_demand:cache=heat", "walk_forward:landing_slots=0", "mixtral_offloading")


def passes(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a prefill and of three decode passes with the KV cache it leaves."""
    with torch.inference_mode():
        out = model(input_ids=ids[:, :-3], use_cache=True)
        found = [out.logits]
        for i in range(ids.shape[1] - 3, ids.shape[1]):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_offloading_never_changes_a_bit(saved, tmp_path, name) -> None:
    """4-bit experts, batch 1 and 4, slots from top_k up, policies of every kind; and again for 16-bit experts."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    ids = {batch: torch.randint(1, 60, (batch, 9)) for batch in (1, 4)}
    spec = models.spec_of(saved(name))
    for bits, policies in ((4, POLICIES), (16, POLICIES[:1])):
        expected: dict[int, list[torch.Tensor]] = {}
        path = tmp_path / f"{bits}.experts"
        every = offload(saved(name), bits=bits, slots=spec.num_experts, store=path, optimize=False, progress=False)
        for batch, tokens in ids.items():
            expected[batch] = passes(every, tokens)
        every.offload_close()
        for policy in policies:
            for slots in (spec.top_k, spec.top_k + 1):
                model = offload(
                    saved(name), bits=bits, slots=slots, policy=policy, store=path, optimize=False, progress=False
                )
                for batch, tokens in ids.items():
                    found = passes(model, tokens)
                    assert all(torch.equal(a, b) for a, b in zip(found, expected[batch], strict=True)), (policy, slots)
                assert model.offload_stats()["misses"] > 0
                model.offload_close()
