"""How TensorFlow uses what a process was given: threads, memory growth, precision."""

import os


def set_up_tensorflow(threads: int, gpus: float) -> None:
    """Call once in a new process, before anything is computed.

    `threads` for the operations of a step; a process with a GPU computes in bfloat16 where weights stay float32, which
    needs no loss scaling. Has not run on a real GPU yet.
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
    keras.config.set_dtype_policy("mixed_bfloat16" if gpus and tf.config.list_physical_devices("GPU") else "float32")
