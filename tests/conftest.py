"""Eight devices on any machine, so that sharded programs are always exercised."""

import os

# Both are read when jax starts its backend. The thread pool must be larger than the number of
# devices: on few cores their collectives otherwise wait for each other for ever.
os.environ.setdefault("NPROC", "64")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
