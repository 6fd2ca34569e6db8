"""Aspect-ratio buckets: sizes for images of other shapes than the square, and an order whose batches never mix them.

Only numpy is imported.
"""

import numpy as np

from arguments import UserError


MAX_RATIO = 2  # of the longer side to the shorter one, of the sizes that are made


def make_buckets(resolution, unit):
    """Sizes (height, width), multiples of `unit`, whose area is that of `resolution` squared or just below it.

    One for every width from `resolution / sqrt(MAX_RATIO)` on, as in NovelAI's and SDXL's finetuning; the square is
    always among them.
    """
    area, low = resolution**2, resolution / MAX_RATIO**0.5
    sides = [unit * i for i in range(int(np.ceil(low / unit)), int(resolution * MAX_RATIO**0.5 / unit) + 1)]
    sizes = {(side, int(area / side / unit) * unit) for side in sides}
    sizes |= {(width, height) for height, width in sizes}
    sizes = {size for size in sizes if min(size) < max(size) <= MAX_RATIO * min(size)}
    return sorted(sizes | {(resolution, resolution)})


def parse_buckets(text):
    """`"1024,1024;832,1216"` -> `[(832, 1216), (1024, 1024)]`, heights first, as in the Diffusers scripts."""
    try:
        sizes = [tuple(int(side) for side in size.split(",")) for size in text.strip(" ;").split(";")]
        if any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--aspect_ratio_buckets {text!r}: give sizes as height,width;height,width (such as '1024,1024;832,1216') "
            "or, for those that follow from --resolution, none."
        ) from None
    if len({height / width for height, width in set(sizes)}) < len(set(sizes)):
        raise UserError(
            f"--aspect_ratio_buckets {text!r}: two of the sizes have the same shape, and images are sorted by theirs: "
            "leave one out."
        )
    return sorted(set(sizes))


def nearest_bucket(sizes, buckets):
    """For image sizes (height, width) `[N, 2]` the index `[N]` of the bucket whose aspect ratio is nearest."""
    ratios = np.log([height / width for height, width in buckets])
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    middles = (np.sort(ratios)[1:] + np.sort(ratios)[:-1]) / 2
    return np.argsort(ratios)[np.searchsorted(middles, np.log(sizes[:, 0] / sizes[:, 1]))]


class BucketOrder:
    """Batch number -> samples of one bucket, so that every sample comes exactly once in each pass over its bucket.

    Each bucket runs through its own shuffled epochs laid end to end, cut into batches; nothing is dropped, for what
    does not fill a batch comes first in the next one. Epoch e of the data has those batches of every bucket which
    are complete after e + 1 passes and were not after e, in random order. So batch k is a function of the seed and k.

    Args:
        bucket_of: the bucket of each sample, int `[N]`.
        batch_size: B, samples of a batch.
        permutation: (key, epoch, n) -> a random permutation of n numbers, a function of its arguments and the seed.
    """

    def __init__(self, bucket_of, batch_size, permutation):
        self.members = [np.flatnonzero(bucket_of == bucket) for bucket in range(max(bucket_of) + 1)]
        self.counts = np.array([len(members) for members in self.members])
        self.batch_size, self.permutation = batch_size, permutation
        self._permutations, self._epochs = {}, {}  # key -> {epoch: permutation}, epoch -> its batches

    def batches_before(self, epoch):
        """How many batches each bucket has given before an epoch, `[buckets]`."""
        return epoch * self.counts // self.batch_size

    def epoch_batches(self, epoch):
        """The batches of an epoch in their order: their buckets, and their numbers among those of their bucket."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        before, after = self.batches_before(epoch), self.batches_before(epoch + 1)
        buckets = np.repeat(np.arange(len(before)), after - before)
        numbers = np.concatenate([np.arange(*ends) for ends in zip(before, after)])
        order = self._permuted(len(self.counts), epoch, len(buckets))
        self._epochs = {epoch: (buckets[order], numbers[order])}
        return self._epochs[epoch]

    def batch(self, number):
        """Bucket of a batch, and the place of its first sample in that bucket's endless row."""
        epoch = number * self.batch_size // self.counts.sum()
        while self.batches_before(epoch + 1).sum() <= number:  # buckets keep back what fills no batch yet
            epoch += 1
        buckets, numbers = self.epoch_batches(epoch)
        within = number - self.batches_before(epoch).sum()
        return int(buckets[within]), int(numbers[within]) * self.batch_size

    def sample(self, bucket, place):
        """The sample at a place of a bucket's endless row."""
        members = self.members[bucket]
        epoch, step = divmod(place, len(members))
        return int(members[self._permuted(bucket, epoch, len(members))[step]])

    def _permuted(self, key, epoch, n):
        """A permutation; those of the last two epochs are kept, as a batch may need the end of one and the next."""
        kept = self._permutations.setdefault(key, {})
        if epoch not in kept:
            self._permutations[key] = kept = {e: order for e, order in kept.items() if e == epoch - 1}
            kept[epoch] = self.permutation(key, epoch, n)
        return kept[epoch]
