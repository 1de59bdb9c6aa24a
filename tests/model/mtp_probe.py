"""Runs SGLang's target and MTP draft models on CPU through prefill and verification, and saves what they return.

Run by `test_mtp.py`: checkpoint, script (JSON), output file. SGLang's own EAGLE worker needs CUDA (it waits for CUDA
streams and judges drafts in `sgl_kernel`); here the script says which drafts are tried and how many are accepted.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import sglang_sm120

# SGLang reads its switches when it is imported.
sglang_sm120.prepare("cpu", 1)

import torch  # noqa: E402
from sglang.bench_one_batch import TreeCacheNamespace  # noqa: E402
from sglang.srt.layers.moe.utils import initialize_moe_config  # noqa: E402
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch  # noqa: E402
from sglang.srt.managers.tp_worker import TpModelWorker  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode  # noqa: E402
from sglang.srt.models import deepseek_v4  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import PortArgs, ServerArgs, set_global_server_args_for_scheduler  # noqa: E402
from sglang.srt.speculative.eagle_info import EagleDraftInput, EagleVerifyInput  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402


class Warnings(logging.Handler):
    """Collects what the weight loader warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def workers(checkpoint: str, draft_tokens: int) -> tuple[TpModelWorker, TpModelWorker, list[str]]:
    """The target, the draft model beside it, and the loader's warnings."""
    args = ServerArgs(
        model_path=checkpoint,
        device="cpu",
        speculative_algorithm="EAGLE",
        speculative_num_steps=draft_tokens - 1,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=draft_tokens,
        disable_cuda_graph=True,
    )
    set_global_server_args_for_scheduler(args)
    initialize_moe_config(args)
    ranks = dict.fromkeys(("gpu_id", "tp_rank", "moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank"), 0)
    port = PortArgs.init_new(args).nccl_port
    target = TpModelWorker(server_args=args, dp_rank=None, nccl_port=port, **ranks)
    seen = Warnings()
    logging.getLogger("sglang.srt.models.deepseek_v4").addHandler(seen)
    requests, tokens = target.get_memory_pool()
    draft = TpModelWorker(
        server_args=args,
        dp_rank=None,
        nccl_port=port,
        is_draft_worker=True,
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=tokens,
        memory_pool_config=target.model_runner.memory_pool_config,
        **ranks,
    )
    embed, head = target.model_runner.model.get_embed_and_head()
    draft.model_runner.model.model.embed_tokens.weight = embed
    draft.model_runner.model.lm_head.weight = head
    return target, draft, seen.messages


class Conversation:
    """A batch of requests in the target and in the draft model, driven step by step as SGLang's EAGLE worker does."""

    def __init__(self, target: TpModelWorker, draft: TpModelWorker, prompts: list[list[int]]) -> None:
        self.target, self.draft = target.model_runner, draft.model_runner
        self.lengths = [len(prompt) for prompt in prompts]
        requests = []
        for i, prompt in enumerate(prompts):
            request = Req(rid=str(i), origin_input_text="", origin_input_ids=prompt, sampling_params=SamplingParams())
            request.fill_ids, request.logprob_start_len = prompt, -1
            request.set_extend_input_len(len(prompt))
            requests.append(request)
        allocator = self.target.token_to_kv_pool_allocator
        batch = ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=self.target.req_to_token_pool,
            token_to_kv_pool_allocator=allocator,
            tree_cache=TreeCacheNamespace(page_size=256, device="cpu", token_to_kv_pool_allocator=allocator),
            model_config=self.target.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        self.step = batch.get_model_worker_batch()
        self.step.capture_hidden_mode = CaptureHiddenMode.FULL
        self.rows = self.step.req_pool_indices
        self.table = self.target.req_to_token_pool.req_to_token

    def prefill(self, following: list[int]) -> dict[str, torch.Tensor]:
        """Both models over the prompts; `following` is the token after each prompt."""
        out = self.target.forward(ForwardBatch.init_new(self.step, self.target)).logits_output
        # Each position of the draft model predicts the token after the next one, from the next one.
        parts = self.step.input_ids.split(self.lengths)
        self.step.input_ids = torch.cat([
            torch.cat([part[1:], part.new_tensor([token])]) for part, token in zip(parts, following, strict=True)
        ])  # fmt: skip
        return {"hidden": out.hidden_states, "draft": self._draft(out.hidden_states)}

    def verify(self, drafts: list[list[int]], accepted: list[int], bonus: list[int]) -> dict[str, torch.Tensor]:
        """The target over the draft tokens of each request, then the draft model over the same rows.

        The first `accepted` drafts of each request are what it goes on with, and `bonus` follows them.
        """
        width = len(drafts[0])
        self._allocate(width)
        step = self.step
        step.forward_mode = ForwardMode.TARGET_VERIFY
        step.input_ids = torch.tensor(drafts).flatten()
        step.seq_lens = torch.tensor(self.lengths)
        step.seq_lens_cpu, step.seq_lens_sum = step.seq_lens.clone(), sum(self.lengths)
        positions = (step.seq_lens[:, None] + torch.arange(width)).flatten()
        step.out_cache_loc = self.table[self.rows.repeat_interleave(width), positions].long()
        step.spec_info = EagleVerifyInput(
            draft_token=step.input_ids, custom_mask=None, positions=positions, retrieve_index=None,
            retrieve_next_token=None, retrieve_next_sibling=None, retrieve_cum_len=None, spec_steps=width - 1, topk=1,
            draft_token_num=width, capture_hidden_mode=CaptureHiddenMode.FULL, seq_lens_sum=step.seq_lens_sum,
            seq_lens_cpu=step.seq_lens_cpu,
        )  # fmt: skip
        batch = ForwardBatch.init_new(step, self.target)
        self.target.attn_backend.init_forward_metadata(batch)
        out = self.target.forward(batch, skip_attn_backend_init=True).logits_output
        # What the worker feeds the draft model: the token after each row; behind the accepted ones it means nothing.
        following = [d[1:a] + [b] + [0] * (width - a) for d, a, b in zip(drafts, accepted, bonus, strict=True)]
        step.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        step.input_ids = torch.tensor(following).flatten()
        step.extend_seq_lens, step.extend_prefix_lens = [width] * len(drafts), list(self.lengths)
        step.extend_num_tokens = width * len(drafts)
        step.seq_lens, step.seq_lens_cpu = step.seq_lens + width, step.seq_lens_cpu + width
        result = {"logits": out.next_token_logits, "hidden": out.hidden_states, "draft": self._draft(out.hidden_states)}
        self.lengths = [length + a for length, a in zip(self.lengths, accepted, strict=True)]
        return result

    def _draft(self, hidden: torch.Tensor) -> torch.Tensor:
        self.step.spec_info = EagleDraftInput(
            hidden_states=hidden, bonus_tokens=self.step.input_ids[:1], new_seq_lens=self.step.seq_lens,
            num_tokens_per_req=1, num_tokens_for_logprob_per_req=1,
        )  # fmt: skip
        batch = ForwardBatch.init_new(self.step, self.draft)
        self.draft.attn_backend.init_forward_metadata(batch)
        model = self.draft.model
        rows, _ = model.model(batch.input_ids, batch.positions, batch)
        return rows.float() @ model.lm_head.weight.float().T

    def _allocate(self, width: int) -> None:
        """Cache slots for `width` more tokens of every request; those of rejected ones are given out again."""
        end = [length + width for length in self.lengths]
        last = self.table[self.rows, torch.tensor(self.lengths) - 1].long()
        new = self.target.token_to_kv_pool_allocator.alloc_extend(
            torch.tensor(self.lengths), torch.tensor(self.lengths), torch.tensor(end), torch.tensor(end), last,
            width * len(end),
        )  # fmt: skip
        for row, length, slots in zip(self.rows.tolist(), self.lengths, new.split(width), strict=True):
            self.table[row, length : length + width] = slots.int()


class Forked(Exception):
    """Instead of CUDA streams, which a CPU lacks."""


def before_streams_part(target: TpModelWorker) -> list[str]:
    """What an attention layer does inside a CUDA graph up to where its streams part."""
    events: list[str] = []

    def fork(*_: object) -> None:
        events.append("streams")
        raise Forked

    layer = target.model_runner.model.model.layers[0].self_attn
    layer.alt_streams, layer._multi_stream_bs_limit, layer._forward_prepare_multi_stream = [], 1, fork
    backend = SimpleNamespace(_maybe_upgrade_forward_metadata=lambda: events.append("metadata"))
    with patch.object(deepseek_v4, "get_is_capture_mode", lambda: True), suppress(Forked):
        layer(torch.zeros(1, 8), torch.zeros(1), SimpleNamespace(attn_backend=backend))
    return events


def ended(accepted: list[int], limit: int, end: int) -> tuple[list[int], str | None]:
    """Tokens and reason of a request that a verification gave `accepted`, if `limit` or the token `end` ends it."""
    sampling = SamplingParams(max_new_tokens=limit)
    sampling.normalize(None)
    request = Req("0", "", [1], sampling, eos_token_ids={end}, vocab_size=100)
    request.output_ids = accepted
    request.check_finished(len(accepted))
    reason = request.finished_reason
    return list(request.output_ids_through_stop), None if reason is None else reason.to_json()["type"]


def main(checkpoint: str, script: Path, out: Path) -> None:
    plan = json.loads(script.read_text())
    target, draft, warnings = workers(checkpoint, len(plan["steps"][0]["drafts"][0]))
    with torch.inference_mode():
        conversation = Conversation(target, draft, plan["prompts"])
        results = [conversation.prefill(plan["following"])]
        results += [conversation.verify(**step) for step in plan["steps"]]
    sizes = {name: parameter.numel() for name, parameter in draft.model_runner.model.named_parameters()}
    saved = {"results": results, "warnings": warnings, "sizes": sizes}
    saved |= {"ended": [ended(**case) for case in plan["endings"]], "order": before_streams_part(target)}
    torch.save(saved, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
