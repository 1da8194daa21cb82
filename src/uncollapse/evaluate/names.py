"""Names of the tasks, free of torch; what each is, the catalogue says."""

TASK_NAMES = (
    "knn",
    "linear",
    "longtail",
    "cluster",
    "prototypes",
    "fewshot",
    "retrieval",
    "finetune",
    "segment",
    "transfer",
)
