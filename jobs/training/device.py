"""How TensorFlow uses what a process was given: threads, memory growth, precision."""

import os

NICENESS = 15
"""What Ray gives all of its workers by itself."""


def give_way() -> None:
    """Let whoever answers somebody go first, on a machine that does both. Holds for this thread and those it starts."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def set_up_tensorflow(threads: int, gpus: float, precision: str = "auto") -> None:
    """Call once in a new process, before anything is computed.

    `threads` for the operations of a step; `precision` is that of `cluster.profile`. On a GPU XLA fuses what lies
    between the exchanges of a step; on CPUs it was no faster at sizes that matter. Has not run on a real GPU yet.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        for device in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(device, True)
    except RuntimeError:
        # A process that is used again has its runtime already, with the same settings.
        pass
    on_gpu = gpus > 0 and bool(tf.config.list_physical_devices("GPU"))
    if on_gpu:
        tf.config.optimizer.set_jit("autoclustering")
    if precision == "auto":
        precision = "bfloat16" if on_gpu else "float32"
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
