"""Price of a grouped matrix product, as Python integers."""


def flops(rows: int, inner: int, columns: int) -> int:
    """FLOPs of one forward product over ``rows`` multiplied rows (2 a multiply-add); backward costs twice that."""
    return 2 * rows * inner * columns


def bytes_moved(rows: int, inner: int, columns: int, groups: int, itemsize: int) -> int:
    """Bytes a forward product must move at least: rows, the matrices of ``groups`` groups in use, and the result."""
    return (rows * (inner + columns) + groups * inner * columns) * itemsize
