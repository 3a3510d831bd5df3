"""The objective of k-means, in float64."""


def objective(points, fitted, weights=None) -> float:
    """Return the (weighted) sum of squared distances of points to the centroids of their codes."""
    centroids, codes = fitted
    squares = (points.double() - centroids.double()[codes.int()]).square()
    return float((squares if weights is None else weights * squares).sum())
