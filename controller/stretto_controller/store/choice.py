"""Which store the settings ask for."""

from __future__ import annotations

from stretto_controller.settings import Settings
from stretto_controller.store.contents import Store
from stretto_controller.store.etcd.store import EtcdStore
from stretto_controller.store.sqlite import SqliteStore


def open_store(settings: Settings) -> Store:
    """A store for one term. Raises StoreError, with what to do, when it cannot be opened."""
    kept_events, kept_generations = settings.service.kept_events, settings.service.kept_generations
    if settings.store == "etcd":
        return EtcdStore(settings.etcd, kept_events=kept_events, kept_generations=kept_generations)
    return SqliteStore(settings.data_dir, kept_events=kept_events, kept_generations=kept_generations)
