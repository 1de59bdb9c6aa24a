"""Compressor: plans and ring against the block formula, fed in any chunks."""

from __future__ import annotations

import pytest
import torch
from cases.common import Maker
from cases.compress_prefill_plan import mapping
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_sm120 import ops
from sglang_sm120.formats import indexer_page, kv_page
from sglang_sm120.formats.compress_plan import CompressPlan, DecodePlan, WritePlan
from sglang_sm120.limits import MAX_DRAFT_TOKENS

DIM = 128
CPU = torch.device("cpu")


def direct(rows: torch.Tensor, ape: torch.Tensor, ratio: int) -> torch.Tensor:
    """Every complete block's vector from all rows [L, D] of one request, by the formula, in float64."""
    blocks = rows.double()[: len(rows) // ratio * ratio].unflatten(0, (-1, ratio))
    if ratio == 128:
        kv, score = blocks.split(DIM, -1)
    else:
        before_kv, own_kv, before_score, own_score = blocks.split(DIM, -1)
        # Block n - 1 beside block n; block 0 has no predecessor.
        before_kv = torch.cat((torch.zeros_like(before_kv[:1]), before_kv))[:-1]
        before_score = torch.cat((torch.full_like(before_score[:1], -torch.inf), before_score))[:-1]
        kv, score = torch.cat((before_kv, own_kv), 1), torch.cat((before_score, own_score), 1)
    return ((score + ape.double()).softmax(1) * kv).sum(1)


class Server:
    """Requests whose tokens arrive in steps, with SGLang's rings and page mapping."""

    def __init__(self, make: Maker, ratio: int, lengths: list[int], ring_size: int) -> None:
        self.ratio, self.ring_size, self.lengths = ratio, ring_size, lengths
        self.where = mapping(make, len(lengths))
        self.requests = self.where.pop("req_pool_indices")
        width = DIM * (4 if ratio == 4 else 2)
        self.rows = [make.normal(length, width) for length in lengths]
        self.ape = make.normal(8 if ratio == 4 else 128, DIM)
        rings = len(self.where["full_to_swa"]) // self.where["swa_page_size"] if ratio == 4 else len(lengths)
        self.ring = make.poisoned(rings * ring_size // ratio, ratio, width, dtype=torch.float32)
        self.done = [0] * len(lengths)
        self.found: list[list[torch.Tensor]] = [[] for _ in lengths]

    def _plan_arguments(self, taking: dict[int, int]) -> dict:
        return {
            "req_pool_indices": self.requests[list(taking)],
            "seq_lens": torch.tensor([self.done[r] + n for r, n in taking.items()]),
            "ring_size": self.ring_size,
            **self.where,
        }

    def step(self, taking: dict[int, int], decode: bool) -> None:
        """Feed taking[request] more tokens of each request."""
        new = torch.cat([self.rows[r][self.done[r] : self.done[r] + n] for r, n in taking.items()])
        plans: tuple[torch.Tensor, ...]
        if decode:
            plans = (ops.compress_decode_plan(self.ratio, **self._plan_arguments(taking)),)
        else:
            extend = torch.tensor(list(taking.values()))
            plans = ops.compress_prefill_plan(self.ratio, extend_lens=extend, **self._plan_arguments(taking))
        out = ops.compress(self.ring, new, self.ape, plans, decode, DIM, self.ratio)
        if decode:
            for row, (r, _) in zip(out, taking.items(), strict=True):
                if (self.done[r] + 1) % self.ratio == 0:
                    self.found[r].append(row)
                else:
                    assert not row.any()
        else:
            owner = torch.repeat_interleave(torch.tensor(list(taking)), extend)
            for row, ragged in zip(out, CompressPlan.unpack(plans[0]).ragged_id, strict=True):
                self.found[int(owner[ragged])].append(row)
        for r, n in taking.items():
            self.done[r] += n

    def check(self) -> None:
        for rows, found, done in zip(self.rows, self.found, self.done, strict=True):
            expected = direct(rows[:done], self.ape, self.ratio)
            assert len(found) == len(expected)
            if found:
                torch.testing.assert_close(torch.stack(found).double(), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.data(), st.sampled_from([(4, 8), (4, 16), (128, 128), (128, 256)]), st.integers(0, 2**32 - 1))
def test_any_chunks_give_the_block_formula(data: st.DataObject, sizes: tuple[int, int], seed: int) -> None:
    ratio, ring_size = sizes
    longest = 300 if ratio == 4 else 700
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=3), label="lengths")
    server = Server(Maker(seed, CPU), ratio, lengths, ring_size)
    while any(done < length for done, length in zip(server.done, lengths, strict=True)):
        left = {r: length - server.done[r] for r, length in enumerate(lengths) if server.done[r] < length}
        started = [r for r in left if server.done[r]]
        if started and data.draw(st.booleans(), label="decode"):
            for _ in range(data.draw(st.integers(1, 9), label="steps")):
                taking = {r: 1 for r in started if server.done[r] < lengths[r]}
                if taking:
                    server.step(taking, decode=True)
        else:
            small = data.draw(st.booleans(), label="small")
            server.step(
                {r: data.draw(st.integers(1, min(n, 9) if small else n), label="tokens") for r, n in left.items()},
                decode=False,
            )
    server.check()


def _verify(server: Server, taking: dict[int, int], accepted: dict[int, int]) -> None:
    """Feed taking[request] drafts of each request, of which all but the first accepted[request] are wrong."""
    right = [rows.clone() for rows in server.rows]
    for r, n in taking.items():
        server.rows[r][server.done[r] + accepted[r] : server.done[r] + n].fill_(torch.nan)
    server.step(taking, decode=False)
    server.rows = right
    for r, n in taking.items():
        server.done[r] -= n - accepted[r]
        del server.found[r][server.done[r] // server.ratio :]


@settings(max_examples=25)
@given(st.data(), st.sampled_from([(4, 16), (128, 256)]), st.integers(0, 2**32 - 1))
def test_rejected_drafts_leave_no_trace(data: st.DataObject, sizes: tuple[int, int], seed: int) -> None:
    ratio, ring_size = sizes
    # Around a block's end, and a window page's at 256.
    lengths = data.draw(st.lists(st.integers(100, 260), min_size=1, max_size=2), label="lengths")
    width = data.draw(st.integers(2, MAX_DRAFT_TOKENS), label="drafts")
    rounds = data.draw(st.integers(1, 12), label="rounds")
    server = Server(Maker(seed, CPU), ratio, [n + (rounds + 1) * width for n in lengths], ring_size)
    server.step(dict(enumerate(lengths)), decode=False)
    for _ in range(rounds):
        taking = dict.fromkeys(range(len(lengths)), width)
        _verify(server, taking, {r: data.draw(st.integers(1, width), label="accepted") for r in taking})
    server.check()


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_prefix_hit_resumes_from_a_window_page_boundary(ratio: int, seed: int) -> None:
    make = Maker(seed, CPU)
    server = Server(make, ratio, [600, 700], 8 if ratio == 4 else 128)
    server.rows[1][:512] = server.rows[0][:512]
    server.step({0: 600}, decode=False)
    # The second request shares the first two window pages of the first and computes nothing for them.
    table = server.where["req_to_token"]
    table[server.requests[1], :512] = table[server.requests[0], :512]
    server.done[1] = 512
    server.step({1: 150}, decode=False)
    for _ in range(38):
        server.step({1: 1}, decode=True)
    expected = direct(server.rows[1], server.ape, ratio)[512 // ratio :]
    assert len(expected) == len(server.found[1]) > 0
    torch.testing.assert_close(torch.stack(server.found[1]).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "ring_size", "row", "before", "own"),
    [
        (4, 8, 5 * 8 + 1, (4 * 8 + 5) // 4, (5 * 8 + 1) // 4),
        (4, 16, 5 * 16 + 1, (4 * 16 + 13) // 4, (5 * 16 + 1) // 4),
        (128, 128, 3 * 128 + 1, 3, 3),
        (128, 256, 3 * 256 + 1, 3 * 2 + 1, 3 * 2),
    ],
)
def test_rings_belong_to_window_pages_or_to_requests(
    ratio: int, ring_size: int, row: int, before: int, own: int
) -> None:
    # Request 3 has position 257 in window page 5, and 253 and 129 in window page 4.
    where = {
        "req_pool_indices": torch.tensor([3]),
        "req_to_token": torch.arange(4 * 512).int().view(4, 512),
        "full_to_swa": torch.arange(-2 * 256, 6 * 256),
        "swa_page_size": 256,
    }
    plan = ops.compress_decode_plan(ratio, seq_lens=torch.tensor([258]), ring_size=ring_size, **where)
    assert torch.cat(DecodePlan.unpack(plan)).tolist() == [258, row, before, own]
    _, plan_w = ops.compress_prefill_plan(
        ratio, seq_lens=torch.tensor([258]), extend_lens=torch.tensor([1]), ring_size=ring_size, **where
    )
    assert torch.cat(WritePlan.unpack(plan_w)).tolist() == [0, row]


@pytest.mark.parametrize(
    ("ratio", "ring_size", "kept"),
    [
        (4, 8, [*range(252, 256), *range(508, 512), *range(516, 523)]),
        (4, 16, [*range(252, 256), *range(508, 512), *range(513, 523)]),
        (128, 128, [*range(512, 523)]),
        (128, 256, [*range(393, 523)]),
    ],
)
def test_a_long_step_keeps_its_last_block_and_its_drafts(ratio: int, ring_size: int, kept: list[int]) -> None:
    where = {
        "req_pool_indices": torch.tensor([0]),
        "req_to_token": torch.arange(1024).int().view(1, -1),
        "full_to_swa": torch.arange(1024),
        "swa_page_size": 256,
    }
    lengths = torch.tensor([523])
    _, plan_w = ops.compress_prefill_plan(ratio, seq_lens=lengths, extend_lens=lengths, ring_size=ring_size, **where)
    assert WritePlan.unpack(plan_w).ragged_id.tolist() == kept


@pytest.mark.parametrize(("dim", "page_size"), [(512, 64), (128, 64)])
def test_store_follows_the_plan(dim: int, page_size: int, seed: int) -> None:
    make = Maker(seed, CPU)
    where = mapping(make, 2)
    plan_c, _ = ops.compress_prefill_plan(
        4, seq_lens=torch.tensor([6, 9]), extend_lens=torch.tensor([6, 3]), ring_size=8, **where
    )
    module = kv_page if dim == 512 else indexer_page
    pages = make.pool(2, module.page_bytes(page_size))
    kv, weight = make.normal(2, dim), torch.ones(dim)
    # Tokens 0 … 5 of the first request, 6 … 8 of the second: blocks end at rows 3 and 7 (position 7).
    out_slots = torch.arange(20, 29)
    ops.compress_norm_rope_store(kv, plan_c, False, 4, weight, 1e-6, make.freqs_cis(), out_slots, pages, page_size)
    written = module.load(pages, torch.arange(2 * page_size), page_size)
    numbers = written.float() if dim == 512 else indexer_page.dequantise(*written)
    assert (~numbers.isnan().any(-1)).nonzero().flatten().tolist() == [23, 27]


def test_prefill_plan_refuses_what_its_rows_cannot_hold() -> None:
    where = {
        "req_pool_indices": torch.tensor([0]),
        "req_to_token": torch.arange(70_000).int().view(1, -1),
        "full_to_swa": torch.arange(70_144),
        "swa_page_size": 256,
    }

    def plan(tokens: int, extend: int, ratio: int = 4, ring_size: int = 8) -> torch.Tensor:
        seq_lens, extend_lens = torch.tensor([tokens]), torch.tensor([extend])
        return ops.compress_prefill_plan(
            ratio, seq_lens=seq_lens, extend_lens=extend_lens, ring_size=ring_size, **where
        )[0]

    assert int(CompressPlan.unpack(plan(65_536, 65_536)).ragged_id.max()) == 65_535
    with pytest.raises(ValueError, match="65537 tokens and the plan's 16-bit rows allow 65536; lower the chunked"):
        plan(65_537, 65_537)
    with pytest.raises(ValueError, match="need 1 <= extend_len <= seq_len"):
        plan(3, 4)
    with pytest.raises(ValueError, match="need 1 <= extend_len <= seq_len"):
        plan(3, 0)
    with pytest.raises(ValueError, match="ratio is 8 and needs to be 4 or 128"):
        plan(8, 8, ratio=8)
    with pytest.raises(ValueError, match="needs to be a multiple of ratio 4"):
        plan(8, 8, ring_size=6)


def test_compress_refuses_mismatched_rows() -> None:
    ring, plan = torch.zeros(2, 4, 512), torch.zeros(0, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="need rows of 512"):
        ops.compress(ring, torch.zeros(1, 256), torch.zeros(8, 128), (plan,), True, 128, 4)
    with pytest.raises(ValueError, match=r"needs \[8, 128\]"):
        ops.compress(ring, torch.zeros(1, 512), torch.zeros(4, 128), (plan,), True, 128, 4)
