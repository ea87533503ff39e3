"""The Triton merge and sums against the plain ones on the CPU: dtypes, views, rows that have seen no key, no addend."""

import pytest
import torch

from ring_attention.merge import add_up, merge
from ring_attention.row_sums import sum_rows
from tests.tools.measure import relative_error

pytestmark = pytest.mark.gpu
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("head_dim", [8, 40, 128, 512])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tiles", [1, 2])
def test_the_merge_equals_the_cpu_merge(head_dim: int, target: torch.dtype, state: torch.dtype, num_tiles: int):
    torch.manual_seed(0)
    batch, tokens, heads = 2, 37, 3
    out = torch.randn(batch, 2 * tokens, heads, head_dim, device="cuda").to(state)[:, tokens:]
    lse = (5 * torch.randn(batch, heads, 2 * tokens, device="cuda"))[..., tokens:]
    outs = torch.randn(num_tiles, batch, heads, tokens, head_dim, device="cuda").bfloat16().transpose(2, 3)
    lses = 5 * torch.randn(num_tiles, batch, tokens, heads, device="cuda").transpose(2, 3)
    out[0, 3], lse[0, :, 3] = 0, float("-inf")
    lse[1, :, 5], lses[0, 1, :, 6], lses[-1, 0, :, 3] = 1e4, 1e4, 1e4
    expected_lse = lse.cpu().clone()
    expected = torch.empty(out.shape)
    merge(expected, out.cpu(), expected_lse, [*zip(outs.cpu(), lses.cpu(), strict=True)])
    got = out if target == state else torch.full(out.shape, float("nan"), device="cuda", dtype=target)
    merge(got, out, lse, [*zip(outs, lses, strict=True)])
    assert relative_error(got.cpu(), expected) < LIMIT[target]
    assert relative_error(lse.cpu(), expected_lse) < 1e-6
    assert torch.equal(got[0, 3].float(), outs[-1, 0, 3].to(target).float())  # the only one, or the greatest by far


@pytest.mark.parametrize("head_dim", [8, 40, 128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_addends", [1, 2, 3, 4])
def test_sums_round_once(head_dim: int, dtype: torch.dtype, first: torch.dtype, num_addends: int):
    """Of views, into the first addend and into another tensor, of half precision and of fp32."""
    addends = [torch.randn(2, 3, 74, head_dim, device="cuda").to(dtype).transpose(1, 2)[:, 37:] for _ in range(4)]
    addends = [torch.randn(2, 37, 3, head_dim, device="cuda").to(first), *addends][:num_addends]
    exact = sum(addend.double() for addend in addends)
    beside = torch.full((2, 74, 3, head_dim), float("nan"), device="cuda", dtype=dtype)[:, 37:]
    for target in (beside, beside.float(), addends[0]):
        add_up(target, addends)
        rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[target.dtype]
        torch.testing.assert_close(target.double(), exact, rtol=rtol, atol=2e-6)


def test_two_returns_join_a_sum_in_place():
    """Of key gradients that travel as a kernel's fp32 sums: views of some tokens."""
    whole, *returned = torch.randn(3, 2, 4, 3 * 37, 128, device="cuda").transpose(2, 3).unbind(0)
    before, total = whole.clone(), whole[:, 37:74]
    returned = [x[:, :37] for x in returned]
    add_up(total, [total, *returned])
    expected = before[:, 37:74].double() + returned[0].double() + returned[1].double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=2e-6)
    assert torch.equal(whole[:, :37], before[:, :37])
    assert torch.equal(whole[:, 74:], before[:, 74:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("k_size", "v_size"), [(8, 8), (40, 24), (200, 200), (1024, 1024), (2056, 8), (6144, 6144)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_received", [0, 5])
def test_sums_of_rows(dtype: torch.dtype, k_size: int, v_size: int, batch: int, num_received: int):
    """Of views, into views: no addend, one, several, many; and copies. Twice, as the second launch is cached."""
    sizes = k_size, v_size
    own = [torch.randn(batch, 20, 3, size + 8, device="cuda").to(dtype)[:, 5:12, 1, :size] for size in sizes]
    received = torch.randn(num_received * sum(sizes), device="cuda").to(dtype)
    exact_own, exact_received = [x.double().cpu() for x in own], received.double().cpu()
    counts = torch.tensor([0, 1, 5, 2, 40, 0] * batch)
    num_entries = 7 * batch + num_received
    for last in (0, 3):
        counts[-1] = last
        addends, starts = torch.randint(num_entries, (int(counts.sum()),)), counts.cumsum(0) - counts
        copied = torch.randint(num_entries, (6 * batch,))
        for rows, begins in ((addends, starts), (copied, None)):
            whole = [torch.full((batch, 12, size), float("nan"), device="cuda", dtype=dtype) for size in sizes]
            expected = [torch.empty(batch, 6, size, dtype=torch.float64) for size in sizes]
            sum_rows((expected[0], expected[1]), (exact_own[0], exact_own[1]), exact_received, rows, begins)
            on_device = (rows.cuda(), None if begins is None else begins.cuda())
            sum_rows((whole[0][:, 3:9], whole[1][:, 3:9]), (own[0], own[1]), received, *on_device)
            # in fp32 a sum of 40 addends is off by more than one rounding
            rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 1e-12)
            for got, part in zip(whole, expected, strict=True):
                torch.testing.assert_close(got[:, 3:9].double().cpu(), part, rtol=rtol, atol=1e-4)
                assert got[:, :3].isnan().all()
                assert got[:, 9:].isnan().all()
