"""What each metric of an evaluation is, in a line: for the page, the terminal and the documentation."""

from __future__ import annotations

import re

_SPLIT = r"(?P<split>many|medium|few|head|body|tail)"
_OF = {
    "many": "classes of over 100 training images",
    "medium": "classes of 20 to 100 training images",
    "few": "classes of fewer than 20 training images",
    "head": "the third of the classes with the most training images",
    "body": "the third of the classes between head and tail",
    "tail": "the third of the classes with the fewest training images",
    "linear": "the linear classifier",
    "knn": "kNN",
    "prototypes": "prototypes as clusters",
    "kmeans": "k-means with a cluster per class",
}
_MEANINGS = [
    (r"top1", "test images whose class is named right"),
    (r"top1_k(?P<n>\d+)", "the same with {n} neighbours"),
    (r"top1_(?P<n>\d+)shot", "test images named right after {n} training image(s) of each class, mean over draws"),
    (r"std_(?P<n>\d+)shot", "its standard deviation over draws"),
    (r"top5", "test images whose class is among the five likeliest"),
    (r"macro|class_mean", "mean over classes of the share named right: rare classes count as much as frequent ones"),
    (r"(?P<of>linear|knn)_overall", "test images named right by {of}"),
    (r"(?P<of>linear|knn)_macro", "mean over classes of the share named right by {of}"),
    (rf"(?P<of>linear|knn)_{_SPLIT}", "test images of {split} named right by {of}"),
    (r"(?P<of>linear|knn)_mean", "mean over data sets of the share named right by {of}"),
    (r"(?P<of>linear|knn) .+", "test images of that set named right by {of}"),
    (r"map", "mean average precision of ranking the training images by cosine"),
    (r"map_at_(?P<n>\d+)", "the same over the first {n} of the ranking"),
    (r"recall_at_(?P<n>\d+)", "test images with one of their class among the first {n}"),
    (r"map_per_class", "mean over classes of their average precision"),
    (r"map_chance", "mean average precision of a random order"),
    (r"miou", "intersection over union of predicted and true masks, mean over classes"),
    (r"pixel_accuracy", "pixels whose class is right"),
    (r"(?P<of>prototypes|kmeans)_ami", "mutual information with the classes, corrected for chance, of {of}"),
    (r"(?P<of>prototypes|kmeans)_nmi", "normalised mutual information with the classes of {of}; grows with clusters"),
    (r"(?P<of>prototypes|kmeans)_ari", "pairs of images put together or apart as the classes do, less chance: {of}"),
    (r"(?P<of>prototypes|kmeans)_fmi", "Fowlkes and Mallows' agreement of pairs of images with the classes: {of}"),
    (r"(?P<of>prototypes|kmeans)_accuracy", "images right when each class gets at most one cluster: {of}"),
    (r"(?P<of>prototypes|kmeans)_purity", "images of the commonest class of their cluster: {of}"),
    (r"n_(?P<of>prototypes|kmeans)_used", "clusters that any test image is in: {of}"),
    (r"top1_merged", "test images named right by their prototype's class, ε-duplicates put together"),
    (r"top1_commonest", "what always naming the largest class would get right"),
    (r"coverage", "classes that own a prototype (are the commonest class of the training images on it)"),
    (r"coverage_test", "classes of which a test image is on a prototype of its class"),
    (r"purity", "test images of the commonest class of their prototype"),
    (r"purity_random", "the same for random groups of the same sizes"),
    (r"class_entropy_bits", "bits left to learn about the class once the prototype is known"),
    (r"n_used", "prototypes that any test image is on"),
    (r"n_owned", "prototypes that any training image is on, so that a class owns them"),
    (r"duplicates_top1", "named right among test images on prototypes that have an ε-duplicate"),
    (r"distinct_top1", "named right among test images on prototypes without an ε-duplicate"),
    (r"duplicates_usage", "test images on prototypes that have an ε-duplicate"),
    (rf"{_SPLIT}_coverage", "{split} that own a prototype"),
    (rf"{_SPLIT}_prototypes_per_class", "prototypes owned, mean over {split}"),
    (rf"{_SPLIT}_distinct_per_class", "the same, ε-duplicates counted once"),
    (
        rf"{_SPLIT}_used_per_class",
        "distinct prototypes on which equally many test images of each class are, mean over {split}",
    ),
    (rf"{_SPLIT}_used_wide_per_class", "the same where prototypes count as one within ε = 0.25, mean over {split}"),
    (
        rf"{_SPLIT}_own_per_class",
        "distinct prototypes on which most of these images are of the class, mean over {split}",
    ),
    (rf"{_SPLIT}_own_ratio", "the same by its mean over all classes, 1 by chance: {split}"),
    (rf"{_SPLIT}_share_ratio", "share of the distinct prototypes owned by share of the training images: {split}"),
    (rf"{_SPLIT}_share_ratio_random", "the same with labels at random: {split}"),
    (rf"{_SPLIT}_top1", "named right by their prototype's class, mean over {split}"),
]


def meaning(metric: str) -> str:
    """A line on what a metric is; empty for one that no task of ours gives."""
    for pattern, text in _MEANINGS:
        if match := re.fullmatch(pattern, metric):
            return text.format(**{k: _OF.get(v, v) for k, v in match.groupdict().items()})
    return ""
