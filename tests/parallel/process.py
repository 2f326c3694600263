"""One of several processes that train the toy method together; run by `test_processes.py`.

python process.py ADDRESS PROCESSES INDEX WORKDIR STEPS
"""

import sys

import jax

from jaxdistill import runner
from jaxdistill.parallel.mesh import make_mesh
from tests.test_backends import min_max, toy_data


def main() -> None:
    """Trains, and resumes what the workdir holds."""
    address, processes, index, workdir, steps = sys.argv[1:]
    jax.distributed.initialize(address, int(processes), int(index))
    assert jax.device_count() == 4 * int(processes) and len(jax.local_devices()) == 4
    data, frozen = toy_data()
    runner.run(
        min_max(),
        data=data,
        frozen=frozen,
        key=jax.random.key(7),
        steps=int(steps),
        chunk=2,
        mesh=make_mesh(class_devices=4),
        workdir=workdir,
        checkpoint_every=2,
    )


if __name__ == "__main__":
    main()
