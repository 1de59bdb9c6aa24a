"""Attention over listed cache slots, key = value shared by all heads, with a sink."""

from __future__ import annotations

import torch

from ...formats import kv_page
from ...registry import Arguments, Op
from .._math import rms_norm, rotate, rotate_tail, row_chunks


@Op
def sparse_mla(
    q: torch.Tensor,
    window_pages: torch.Tensor,
    window_slots: torch.Tensor,
    window_lengths: torch.Tensor,
    window_page_size: int,
    extra_pages: torch.Tensor | None,
    extra_slots: torch.Tensor | None,
    extra_lengths: torch.Tensor | None,
    extra_page_size: int | None,
    sink: torch.Tensor,
    scale: float,
    freqs_cis: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    q_eps: float | None = None,
) -> torch.Tensor:
    """One softmax per head over the window's slots, the extra slots and a sink that has no value.

        s_i = scale q · k_i;   o = Σ e^{s_i - M} k_i / (Σ e^{s_i - M} + e^{sink - M})

    q bf16 [T, h, 512]; pages uint8 [P, >= 584 * page_size] as in `formats.kv_page`; slots int32 [T, W];
    lengths int [T]: slots at or beyond them are not read; slot -1 inside contributes nothing. The four
    extra_* are None on window-only layers. sink fp32 [h]. fp32 throughout, rounded once: returns bf16 [T, h,
    512], zero for a row without candidates. Gathered keys take at most about 16 MiB at a time.

    With freqs_cis complex64 [S, 32] and positions int [T], which come together, the RoPE that the keys' last 64
    channels have is taken from the result's: o is turned by the conjugate of freqs_cis[positions[t]]. With q_eps
    besides, q is as projected: each head gets its RMS norm without weight and then RoPE, rounded once to bf16.
    """
    if q_eps is not None and freqs_cis is not None and positions is not None:
        q = rotate_tail(rms_norm(q, None, q_eps), freqs_cis, positions).to(q.dtype)
    pools = [(window_pages, window_slots, window_lengths, window_page_size)]
    if extra_pages is not None and extra_slots is not None and extra_lengths is not None and extra_page_size:
        pools.append((extra_pages, extra_slots, extra_lengths, extra_page_size))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    width = sum(pool[1].shape[1] for pool in pools)
    for rows in row_chunks(q.shape[0], width * (kv_page.DIM + 2 * q.shape[1]) * 4):
        gathered = [_keys(pages, slots[rows], lengths[rows], size) for pages, slots, lengths, size in pools]
        keys = torch.cat([k for k, _ in gathered], dim=1)
        live = torch.cat([mask for _, mask in gathered], dim=1).unsqueeze(1)
        scores = (q[rows].float() @ keys.transpose(1, 2) * scale).masked_fill(~live, -torch.inf)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink.float().view(1, -1, 1))
        weights = torch.exp(scores - top).masked_fill(~live, 0)
        total = weights.sum(-1, keepdim=True) + torch.exp(sink.float().view(1, -1, 1) - top)
        o = (weights @ keys / total).masked_fill(~live.any(-1, keepdim=True), 0)
        if freqs_cis is not None and positions is not None:
            o[..., -64:] = rotate(o[..., -64:], freqs_cis, positions[rows], inverse=True)
        out[rows] = o.to(q.dtype)
    return out


@sparse_mla.checked
def _check(a: Arguments) -> str | None:
    if (a.freqs_cis is None) != (a.positions is None):
        return "one of freqs_cis and positions came without the other; pass both or none."
    if a.q_eps is not None and a.freqs_cis is None:
        return "q_eps came without freqs_cis and positions, by which q is to be turned; pass all three."
    if a.extra_pages is not None and (a.extra_slots is None or a.extra_lengths is None or not a.extra_page_size):
        return "extra_pages came without its slots, lengths or page size; pass all or none."
    return None


def _keys(
    pages: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 keys [T, w, 512] and which of them count [T, w], w the longest length.

    Neighbouring rows list mostly the same slots, so each distinct slot is dequantised once.
    """
    width = min(int(lengths.max()), slots.shape[1]) if lengths.numel() else 0
    slots = slots[:, :width]
    live = (torch.arange(width, device=slots.device) < lengths.unsqueeze(1)) & (slots >= 0)
    distinct, index = slots.masked_fill(~live, -1).unique(return_inverse=True)
    return kv_page.load(pages, distinct, page_size).float()[index], live
