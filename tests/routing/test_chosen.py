"""The affinity of a token to its own experts is what all scores would have said, forward and backward."""

import pytest
import torch

from stablemoe_ds.routing.chosen import chosen_affinity
from tests.routing.test_router import B, N, S, alone, make, stream, view

T, D = 7, 5


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients(top_k):
    torch.manual_seed(0)
    hidden_TD, centroids_ND = (torch.randn(rows, D, dtype=torch.float64, requires_grad=True) for rows in (T, N))
    chosen_TK = torch.randint(N, (T, top_k))
    assert torch.autograd.gradcheck(lambda h, c: chosen_affinity(h, c, chosen_TK), (hidden_TD, centroids_ND))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_following_gives_the_gates_and_gradients_of_choosing(top_k, normalize, dtype):
    router, found = make(top_k, normalize), []
    weight_TK = torch.randn(S * B, top_k)
    fixed_TK = router(stream().to(dtype), view(), None, alone).expert_TK
    for given in (None, fixed_TK):
        hidden = stream().to(dtype).requires_grad_()
        router.zero_grad()
        routes = router(hidden, view(), given, alone)
        (routes.gate_TK * weight_TK).sum().backward()
        found.append((routes.gate_TK, hidden.grad, router.centroids.grad))
    for chosen, followed in zip(*found, strict=True):
        torch.testing.assert_close(followed, chosen, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_padding_is_followed_nowhere():
    router, real_T = make(1), torch.arange(S * B) % 3 > 0
    fixed_TK = torch.where(real_T[:, None], torch.ones(S * B, 1, dtype=torch.int64), -1)
    routes = router(stream(), view(real_T), fixed_TK, alone)
    assert routes.expert_TK.equal(fixed_TK)
    assert routes.counts_N.tolist() == [0, int(real_T.sum()), *[0] * (N - 2)]
