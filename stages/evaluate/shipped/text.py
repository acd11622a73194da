"""Text that models read."""

from stages.evaluate.shipped.declaration import Shipped

TASKS = {
    "bits_per_byte": Shipped(
        "any documents, in windows of 2,048 tokens", "", kind="documents", keys={"context_length": 2048}
    )
}
