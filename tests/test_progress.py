import threading

from autocompress.progress import heard_by, report, span


def test_a_share_of_a_part_is_a_share_of_the_whole():
    heard: list[float] = []
    with heard_by(heard.append):
        with span(0.5, 1), span(0, 0.5):
            report(0.5)
        with heard_by(None):
            report(0.1)
    report(0.2)
    assert heard == [0.625, 0.75, 1.0]


def test_another_thread_is_not_heard():
    heard: list[float] = []
    with heard_by(heard.append):
        other = threading.Thread(target=report, args=(0.5,))
        other.start()
        other.join()
    assert heard == []
