# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a dataset: the whole of it, or one sample."""


class DataError(ValueError):
    """The dataset cannot be used: a shard, the index, a task or a setting. Names it and says what to do."""


class SampleError(DataError):
    """One sample cannot be used: undecodable image, broken json. Names shard and sample.

    The only data error that ``data.on_bad_sample: skip`` turns into a count.
    """
