"""Butcher tableaus of the explicit Runge-Kutta methods; numbers of the embedded pairs as in diffrax 0.7."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tableau:
    """An explicit method, perhaps with an embedded one of an order less.

    Attributes:
      a: weights of earlier stages in stages 2, 3, ...
      b: weights of all stages in the step.
      c: times of stages 2, 3, ... within the step.
      order: p of the step.
      error: b minus the embedded method's weights; empty where there is none.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    error: tuple[float, ...] = ()

    @property
    def fsal(self) -> bool:
        """Whether the last stage is the next step's first."""
        return bool(self.a) and self.b == (*self.a[-1], 0.0)

    @property
    def fresh(self) -> int:
        """Evaluations of f that an attempted step adds."""
        return len(self.b) - self.fsal

    @property
    def terms(self) -> int:
        """Products of a scalar and a state in an attempted step, its error included."""
        step = 0 if self.fsal else len(self.b)  # with FSAL the step is the last stage's point
        return sum(len(row) for row in self.a) + step + len(self.error)


EULER = Tableau(a=(), b=(1.0,), c=(), order=1)

RK4 = Tableau(
    a=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.5, 0.5, 1.0),
    order=4,
)

_TSIT5 = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
TSIT5 = Tableau(  # Tsitouras 2011, table 1
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401,
         -0.028269050394068383),
        _TSIT5,
    ),
    b=(*_TSIT5, 0.0),
    c=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    order=5,
    error=(
        _TSIT5[0] - 0.09468075576583945,
        _TSIT5[1] - 0.009183565540343254,
        _TSIT5[2] - 0.4877705284247616,
        _TSIT5[3] - 1.234297566930479,
        _TSIT5[4] + 2.7077123499835256,
        _TSIT5[5] - 1.866628418170587,
        -1 / 66,
    ),
)  # fmt: skip

_DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DOPRI5 = Tableau(  # Dormand and Prince 1980; the error weights of Shampine 1986
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5,
    ),
    b=(*_DOPRI5, 0.0),
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    order=5,
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
)

TABLEAUS = {"euler": EULER, "rk4": RK4, "tsit5": TSIT5, "dopri5": DOPRI5}
