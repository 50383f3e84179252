"""What an editing method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from mendlm.apply import Intervention
from mendlm.text import Batch


class Method(ABC):
    """An algorithm that turns requests into a change of the model."""

    name: ClassVar[str]
    """What the command line and result files call the method."""

    @abstractmethod
    def edit(self, model: Any, batch: Batch) -> Intervention:
        """One independent edit for each example of the batch (a batched `Edit`, for methods that edit weights).

        Recorded on the model as it runs now: under the edits that are active around the call. Weights and `.grad` of the
        model are left alone.
        """
