"""SIGKILL before every change of a file while a run is finished: it can always be resumed, and to the same end."""

import os
import shutil
import signal

from tests.faults.conftest import assert_same_weights, in_child, kill_at

KILLED = -signal.SIGKILL
MOST_OPERATIONS = 400
EVERY = int(os.environ.get("FAULTS_EVERY", 3))
"""1 kills at every operation, which takes half an hour; 3 at every third one."""


def test_a_run_survives_a_kill_at_every_file_operation_of_finishing(trainer, new_workspace, tmp_path):
    whole = new_workspace("whole")
    assert in_child(lambda: trainer.main(whole)) == 0
    expected = trainer.weights(whole)

    # trained to the end, and not finished at all
    trained = new_workspace("trained")

    def killed_first():
        kill_at(1, trained)
        trainer.main(trained)

    assert in_child(killed_first) == KILLED
    for number in range(1, MOST_OPERATIONS, EVERY):
        root = tmp_path / "broken"
        shutil.copytree(trained, root)

        def killed(root=root, number=number):
            kill_at(number, root)
            trainer.main(root, "--resume")

        log = tmp_path / "log"
        ended = in_child(killed, output=log)
        assert ended in (0, KILLED), log.read_text()
        assert in_child(lambda root=root: trainer.main(root, "--resume"), output=log) == 0, (
            number,
            log.read_text(),
        )
        assert (trainer.folder(root) / "COMPLETE").is_file()
        assert_same_weights(trainer.weights(root), expected)
        assert not list(trainer.folder(root).rglob("step_*")), number
        assert not list(root.rglob("*.tmp")) and not list(root.rglob(".*.lock")), number
        if trainer.name == "qwen":
            assert (trainer.folder(root) / "evaluation.json").is_file()
        shutil.rmtree(root)
        if ended == 0:
            break
    else:
        raise AssertionError("the run is never finished")
    assert number > 5, "nothing was killed"
