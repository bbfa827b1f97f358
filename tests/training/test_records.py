"""The progress bar, as a reader sees it."""

import io

from rich.console import Console

from dyncomp.training.records import Bar


def test_the_bar_names_the_run_and_shows_steps_rate_and_loss():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    bar = Bar("top[p]", 4, 1, True, console)

    def drawn():
        stream.seek(0)
        stream.truncate()
        console.print(bar.progress.get_renderable())
        return stream.getvalue()

    with bar.doing("compiling"):
        assert "top[p]" in drawn() and "1/4" in drawn() and "compiling" in drawn()
    bar.update(3)
    bar.logged(1.23456, 0.04)
    with bar.doing("evaluating"):
        assert "evaluating" in drawn() and "loss" not in drawn()
    bar.update(4)
    assert "4/4" in drawn() and "25 steps/s loss 1.235" in drawn()
    bar.close()


def test_a_bar_that_is_not_shown_prints_nothing():
    stream = io.StringIO()
    bar = Bar("x", 4, 0, False, Console(file=stream, force_terminal=True))
    bar.update(4)
    bar.logged(1.0, 1.0)
    bar.close()
    assert stream.getvalue() == ""
