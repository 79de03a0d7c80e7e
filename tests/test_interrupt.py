import os
import signal
import threading

import pytest

from autocompress.processes.interrupt import gentle_interrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_is_noted_and_the_second_raises():
    said: list[str] = []
    with gentle_interrupt(said.append) as asked:
        assert not asked()
        press_ctrl_c()
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert len(said) == 1 and "Ctrl-C again" in said[0]
    with pytest.raises(KeyboardInterrupt):  # as before
        press_ctrl_c()


def test_it_may_come_in_the_middle_of_a_print():
    """Streams are not reentrant: what prints in a signal handler fails where the same thread is printing."""
    stream, said = threading.Lock(), []

    def say(sentence: str) -> None:
        with stream:
            said.append(sentence)

    with gentle_interrupt(say) as asked, stream:
        press_ctrl_c()
        assert asked() and not said
    assert len(said) == 1


def test_a_handler_of_somebody_else_stays():
    seen: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with gentle_interrupt(print) as asked:
            press_ctrl_c()
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT]


def test_in_another_thread_nothing_changes():
    asked_in_thread: list[bool] = []

    def work() -> None:
        with gentle_interrupt(print) as asked:
            asked_in_thread.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked_in_thread == [False]
