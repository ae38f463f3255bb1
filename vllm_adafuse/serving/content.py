"""Which values of the adapter a worker holds, and whether those on disk are still the same."""

from __future__ import annotations

from collections.abc import Callable

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter, check_adapter
from vllm_adafuse.format.config import ADAPTER_KEY, FINGERPRINT_KEY
from vllm_adafuse.format.digest import content_hash, file_identity


def open_checked(section: dict[str, str]) -> Adapter:
    """Opens the adapter that the front end has checked; it must not have changed since.

    Args:
        section: `hf_config.adafuse`, as `attach_adapter` leaves it.

    Raises:
        AdapterError: its files are not those that the front end saw.
    """
    path = section[ADAPTER_KEY]
    adapter, problems = check_adapter(path, values=False)
    if not problems and adapter.fingerprint != section[FINGERPRINT_KEY]:
        problems = [
            f"its fingerprint is {adapter.fingerprint}, expected {section[FINGERPRINT_KEY]}: the "
            "files differ from those checked at start; give every machine the same adapter"
        ]
    if problems:
        raise AdapterError(f"adapter {path}", problems)
    return adapter


class Content:
    """The adapter's values in this worker.

    Args:
        adapter: as it was opened at start.
        expected: content hash that the front end found.

    Attributes:
        start: hash of the values at start, by which the front end knows the adapter.
        hash: of the values that are loaded.
        loaded: whether they are.
    """

    def __init__(self, adapter: Adapter, expected: str):
        self.adapter, self.start, self.hash = adapter, expected, expected
        self.loaded = False
        self._identity: tuple = ()

    def load(self, read_values: Callable[[], None]) -> None:
        """Loads the values at start.

        Raises:
            AdapterError: they are others than those that the front end checked.
        """
        path, identity = self.adapter.path, file_identity(self.adapter.path)
        if (found := content_hash(path)) != self.hash:
            raise AdapterError(
                f"adapter {path}",
                [
                    f"its content hash is {found}, expected {self.hash}: its values differ from "
                    "those checked at start; give every machine the same adapter"
                ],
            )
        self._read(read_values, identity)
        self._identity, self.loaded = identity, True

    def load_changed(self, read_values: Callable[[], None]) -> bool:
        """Loads the values again if those on disk are others.

        Returns:
            Whether they were.

        Raises:
            AdapterError: the files on disk cannot be used, or are of another shape than the
                model was built for, and nothing is loaded; or they change meanwhile.
        """
        path, identity = self.adapter.path, file_identity(self.adapter.path)
        if identity == self._identity:
            return False
        if (found := content_hash(path)) != self.hash:
            changed, problems = check_adapter(path)
            if not problems and changed.fingerprint != self.adapter.fingerprint:
                problems = [
                    "its config, or the names, shapes or dtypes of its tensors have changed, "
                    "expected new values only: a running model cannot take another shape; its old "
                    "values are still served. Start the server again"
                ]
            if problems:
                raise AdapterError(f"adapter {path}", problems)
            self._read(read_values, identity)
        again, self.hash, self._identity = found != self.hash, found, identity
        return again

    def _read(self, read_values: Callable[[], None], identity: tuple) -> None:
        """Reads values of files that were the same before and are behind it.

        Raises:
            AdapterError: they are not, and what was read may be of both.
        """
        read_values()
        if file_identity(path := self.adapter.path) != identity:
            raise AdapterError(
                f"adapter {path}",
                [
                    "its files changed while they were read, and the values in this worker may be of "
                    "both; load it again when they are complete"
                ],
            )
