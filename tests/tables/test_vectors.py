"""Vectors of ids and their clusters, held against dense arithmetic written out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_array

from stablemoe_ds.config.table_options import VectorOptions
from stablemoe_ds.tables.kmeans import spherical_kmeans, weighted_centroids
from stablemoe_ds.tables.vectors import id_vectors, positive_pmi, unit_rows
from tests.tables.texts import corpus_of, random_stream, slow_followers, text_of_kinds

Matrix = NDArray[np.float64]


def dense_ppmi(counts: Matrix) -> Matrix:
    """max(0, log(p(x, y) / (p(x) p(y)))), entry by entry."""
    share, weighed = counts / counts.sum(), np.zeros(counts.shape)
    for x, y in zip(*counts.nonzero(), strict=True):
        weighed[x, y] = max(0.0, np.log(share[x, y] / (share[x].sum() * share[:, y].sum())))
    return weighed


def dense_vectors(right: Matrix, options: VectorOptions) -> Matrix:
    weigh = dense_ppmi if options.weighting == "ppmi" else np.log1p
    parts = {
        "both": [weigh(right.T), weigh(right)],
        "joined": [weigh(right + right.T)],
        "left": [weigh(right.T)],
        "right": [weigh(right)],
    }[options.sides]
    left, values, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
    scaled = (left * values**options.power)[:, : options.dims]
    return unit_rows(scaled)


@pytest.mark.parametrize("sides", ["both", "joined", "left", "right"])
@pytest.mark.parametrize("weighting", ["ppmi", "log"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dims", [5, 60])
def test_vectors_are_those_of_the_dense_decomposition(sides: str, weighting: str, power: float, dims: int) -> None:
    """Signs are free, so cosines between ids are compared. 5 of 60 are found by iteration, 60 of 60 are not."""
    stream = random_stream(3, vocab=60, tokens=6000)
    options = VectorOptions.model_validate({"sides": sides, "weighting": weighting, "power": power, "dims": dims})
    found = id_vectors(corpus_of(stream, 60).followers(), options, seed=1)
    wanted = dense_vectors(slow_followers(stream, 60, 1).astype(float), options)
    assert found.shape == (60, dims)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-7)


def test_positive_pmi() -> None:
    counts = np.random.default_rng(0).poisson(0.7, (20, 30)).astype(float)
    counts[4], counts[:, 7] = 0, 0
    np.testing.assert_allclose(positive_pmi(csr_array(counts)).toarray(), dense_ppmi(counts), atol=1e-12)


def test_signs_and_start_do_not_matter() -> None:
    """The same vectors to the bit with one seed; with another start of the iteration, within its precision."""
    corpus = text_of_kinds()
    one, same, other = (id_vectors(corpus.followers(), VectorOptions(dims=6), seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    np.testing.assert_allclose(one, other, atol=1e-7)


def test_ids_without_neighbours_have_no_direction() -> None:
    corpus = text_of_kinds(absent=20)
    vectors = id_vectors(corpus.followers(), VectorOptions(), 0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), corpus.token_counts > 0, atol=1e-12)


def test_no_neighbours_at_all() -> None:
    assert not id_vectors(csr_array((7, 7), dtype=float), VectorOptions(), 0).any()


def test_fewer_dimensions_than_asked_for_where_there_are_no_more() -> None:
    """A chain of three ids has three independent rows."""
    followers = csr_array(np.array([[0.0, 2, 0], [0, 0, 2], [2, 0, 0]]))
    assert id_vectors(followers, VectorOptions(dims=64), 0).shape == (3, 3)


def objective(vectors: Matrix, weights: Matrix, centroids: Matrix) -> float:
    return float(weights @ (vectors @ centroids.T).max(1))


def test_clusters_that_are_there_are_found() -> None:
    random = np.random.default_rng(0)
    kind = random.integers(0, 5, 300)
    vectors = unit_rows(np.eye(8)[kind] + 0.1 * random.normal(size=(300, 8)))
    centroids = spherical_kmeans(vectors, np.ones(300), 5, seed=1)
    nearest = (vectors @ centroids.T).argmax(1)
    assert len({(int(k), int(n)) for k, n in zip(kind, nearest, strict=True)}) == 5


def test_centroids_are_the_best_for_their_clusters_and_the_other_way_round() -> None:
    random = np.random.default_rng(1)
    vectors, weights = unit_rows(random.normal(size=(200, 6))), random.random(200)
    centroids = spherical_kmeans(vectors, weights, 7, seed=2)
    nearest = (vectors @ centroids.T).argmax(1)
    for cluster in range(7):
        wanted = (weights[nearest == cluster, None] * vectors[nearest == cluster]).sum(0)
        np.testing.assert_allclose(centroids[cluster], wanted / np.linalg.norm(wanted), atol=1e-12)
    best = objective(vectors, weights, centroids)
    for _ in range(20):
        assert objective(vectors, weights, unit_rows(random.normal(size=(7, 6)))) < best


def test_a_weight_is_as_many_vectors() -> None:
    random = np.random.default_rng(2)
    vectors, weights = unit_rows(random.normal(size=(30, 4))), random.integers(1, 5, 30)
    cluster, start = random.integers(0, 3, 30), np.zeros((3, 4))
    many, many_clusters = np.repeat(vectors, weights, axis=0), np.repeat(cluster, weights)
    one = weighted_centroids(vectors, weights.astype(float), cluster, start)
    np.testing.assert_allclose(one, weighted_centroids(many, np.ones(len(many)), many_clusters, start), atol=1e-12)


@pytest.mark.parametrize("clusters", [1, 3, 9])
def test_more_clusters_than_vectors(clusters: int) -> None:
    vectors = np.vstack([np.eye(3), np.zeros((2, 3))])
    centroids = spherical_kmeans(vectors, np.ones(5), clusters, seed=0)
    assert centroids.shape == (clusters, 3)
    assert np.isfinite(centroids).all()
    if clusters >= 3:
        assert objective(vectors, np.ones(5), centroids) == pytest.approx(3)
