"""Replays a crash before every single change that the store makes, and looks at what the next start finds.

The store is the real one, on a file system in memory that forgets what was not synced. Whatever a
crash leaves: what is listed is complete and right, what was promised holds, nothing unlisted can be
served, and work goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cached.model import ArtifactId, Claim, ClaimId, Note, Ref, RevisionKey, hub_parts
from cached.store import Scan, ScrubMark, Store
from cached.store.layout import Intent, Layout, decode
from tests.memfs import Chance, Doubles, Fate, Kill, Losses, MemFs, NamesOnly
from tests.storekit import SmallModel, deliver, fetch, pin, sha256

ROOT = Path("/data")
AT = Layout(ROOT)
SHARED = b"both have this one"
A = SmallModel("hf://org/m@main", {"deep/model.bin": b"weights of a", "tokenizer": SHARED}, version="a" * 40)
B = SmallModel("hf://org/m@v/1", {"model.bin": b"weights of b", "tokenizer": SHARED}, version="b" * 40)
LOOSE = SmallModel("c", {"model.bin": b"nobody vouches for these", "tokenizer": SHARED}, attested=False)
MODELS = {model.id: model for model in (A, B, LOOSE)}
BAD = b"WEIGHTS of b"
PIN, OTHER_PIN = pin("pin-a", A.ref), pin("pin-b", B.ref)
COPY_OF_A = Note(Ref("hf://copy/m"), RevisionKey("c" * 64), A.id, True, 110.0, commit="c" * 40)
A_BECAME_B = Note(A.ref, RevisionKey("d" * 64), B.id, True, 120.0, commit=B.revision.commit)
SCRUBBED = ScrubMark("ab" * 32, 1.0, 0.5)
SEEDS = range(3)


def fates() -> list[Fate]:
    return [Fate(), Kill(), NamesOnly(), Doubles(), Losses(), *(Chance(seed) for seed in SEEDS)]


@dataclass
class Promises:
    """What the store has said by now. What is neither here nor there is being changed at this moment."""

    artifacts: set[ArtifactId] = field(default_factory=set)
    gone: set[ArtifactId] = field(default_factory=set)
    claims: dict[ClaimId, Claim] = field(default_factory=dict)
    ended: set[ClaimId] = field(default_factory=set)
    damaged: bool = False
    """Whether B's blob is bad under every name it has; true from before its quarantine."""
    put_away: bool = False
    purging: bool = False
    """Whether the damaged content may be removed by now; the record of it may not."""

    def copy(self) -> Promises:
        return Promises(
            set(self.artifacts),
            set(self.gone),
            dict(self.claims),
            set(self.ended),
            self.damaged,
            self.put_away,
            self.purging,
        )


@dataclass(frozen=True)
class Moment:
    """The file system right before a change, and what had been promised."""

    fs: MemFs
    promises: Promises
    step: str


class Story:
    """Runs steps on a store and keeps a moment before each change. ``step`` names where we are."""

    def __init__(self, fs: MemFs) -> None:
        self.fs, self.promises, self.step = fs, Promises(), "open"
        self.moments: list[Moment] = []
        fs.before_change = self.keep

    def keep(self) -> None:
        self.moments.append(Moment(self.fs.copy(), self.promises.copy(), self.step))

    def fetch(self, store: Store, model: SmallModel) -> None:
        self.step = f"fetch {model.ref}"
        self.promises.gone.discard(model.id)
        fetch(store, self.fs, model)
        self.promises.artifacts.add(model.id)

    def evict(self, store: Store, model: SmallModel) -> None:
        self.step = f"evict {model.ref}"
        self.promises.artifacts.discard(model.id)
        store.evict(model.id, model.digests)
        self.promises.gone.add(model.id)

    def put_note(self, store: Store, note: Note) -> None:
        self.step = f"note {note.ref}"
        store.put_note(note)

    def put_claim(self, store: Store, claim: Claim) -> None:
        self.step = f"put {claim.id}"
        self.promises.ended.discard(claim.id)
        store.put_claim(claim)
        self.promises.claims[claim.id] = claim

    def delete_claim(self, store: Store, claim: Claim) -> None:
        self.step = f"delete {claim.id}"
        self.promises.claims.pop(claim.id)
        store.delete_claim(claim.id)
        self.promises.ended.add(claim.id)

    def quarantine_b(self, store: Store) -> None:
        self.step = "quarantine b"
        damage_b(self.fs)
        self.promises.damaged = True
        self.promises.artifacts.discard(B.id)
        store.quarantine((B.id,), B.digests[0], "its sha256 is another", 150.0)
        self.promises.gone.add(B.id)
        self.promises.put_away = True

    def purge_b(self, store: Store) -> None:
        self.step = "purge b"
        self.promises.purging = True
        store.purge(f"{B.digests[0]}.150")

    def discard(self, store: Store, model: SmallModel) -> None:
        self.step = f"discard {model.ref}"
        plan = store.begin_fetch(model.revision, 100.0)
        store.commit_blob(model.revision.key, 0, deliver(self.fs, plan.directory, 0, model.contents[0]))
        store.discard(model.revision.key, model.digests)

    def run(self) -> None:
        store = Store.open(ROOT, self.fs)
        store.scan(50.0)
        self.put_claim(store, PIN)
        self.fetch(store, A)
        self.fetch(store, B)
        self.put_claim(store, OTHER_PIN)
        self.put_note(store, COPY_OF_A)
        self.put_note(store, A_BECAME_B)
        self.evict(store, A)
        self.fetch(store, A)
        self.delete_claim(store, PIN)
        self.fetch(store, LOOSE)
        self.discard(store, SmallModel("d", {"x": b"never finished", "y": b"not even begun"}))
        self.quarantine_b(store)
        self.evict(store, A)
        self.fetch(store, B)
        self.put_claim(store, PIN)
        store.put_scrub_mark(SCRUBBED)
        store.put_scrub_mark(SCRUBBED)
        self.purge_b(store)
        self.keep()
        store.close()
        self.fs.before_change = None


def damage_b(fs: MemFs) -> None:
    """What a sick disk does: the content is another at once and for good, without anybody's write."""
    fs.spoil(AT.blob(B.digests[0]), BAD)


def start(fs: MemFs) -> tuple[Store, Scan]:
    store = Store.open(ROOT, fs)
    return store, store.scan(300.0)


# --- what must hold -------------------------------------------------------------------------


def check(fs: MemFs, found: Scan, promises: Promises) -> None:
    listed = {artifact.id for artifact in found.artifacts}
    check_contents(fs, found, promises)
    check_hub(fs, found)
    assert promises.artifacts <= listed, "a promised artifact is gone"
    assert not promises.gone & listed, "an artifact came back"
    claims = {claim.id: claim for claim in found.claims}
    assert promises.claims.items() <= claims.items(), "a promised claim is gone"
    assert not promises.ended & claims.keys(), "a claim came back"
    assert found.problems == ()
    assert {note.ref for note in found.notes} >= {MODELS[artifact].ref for artifact in listed}
    assert all(note.artifact in listed for note in found.notes)
    check_damage(fs, found, promises)


def check_damage(fs: MemFs, found: Scan, promises: Promises) -> None:
    blamed = {down.artifact for down in found.quarantined}
    assert blamed <= ({B.id} if promises.damaged else set()), "a crash of ours looks like damage"
    kept = [path for path in fs.files_under(AT.quarantine) if path.endswith("/blob")]
    quarantined = [fs.read_file(AT.quarantine / path) for path in kept]
    listed = any(artifact.id == B.id for artifact in found.artifacts)
    if promises.purging:
        assert quarantined in ([BAD], [])
    elif promises.put_away or (promises.damaged and not listed):
        assert quarantined == [BAD], "damaged content was silently deleted"
    else:
        assert quarantined == []
    places = fs.list_dir(AT.quarantine)
    assert all(not name.startswith(".") for name in places)
    assert all(decode(fs.read_file(AT.quarantine / name / "reason.json"), Intent) for name in places)
    assert len(places) >= promises.put_away, "nothing tells any more why it was put away"
    assert [aside.size_bytes for aside in found.asides] == [len(BAD) for _ in quarantined]


def check_contents(fs: MemFs, found: Scan, promises: Promises) -> None:
    listed = {artifact.id.removeprefix("sha256:") for artifact in found.artifacts}
    assert set(fs.list_dir(AT.trees)) == listed, "trees are not what is listed"
    for artifact in found.artifacts:
        model, tree = MODELS[artifact.id], AT.tree(artifact.id)
        expected = {file.path: file.blob for file in model.manifest.files}
        assert fs.files_under(tree).keys() == expected.keys(), "a tree is not whole"
        for path, blob in expected.items():
            assert fs.same_file(tree / path, AT.blob(blob.sha256)), "a tree shows something else"
    blobs = {path.partition("/")[2]: fs.read_file(AT.blobs / path) for path in fs.files_under(AT.blobs)}
    for digest, content in blobs.items():
        assert sha256(content) == digest or may_be_bad(content, promises), "a blob is wrong"
    needed = {digest for artifact in found.artifacts for digest, _ in artifact.blobs}
    assert needed <= blobs.keys(), "a listed artifact lacks a blob"


def check_hub(fs: MemFs, found: Scan) -> None:
    """Whatever is noted of the Hub's refs is shown, whole; and nothing else but what is listed."""
    snapshots = {(AT.snapshot("org/m", m.revision.commit), m.id) for m in (A, B) if m.id in ids(found)}
    refs: dict[Path, str] = {}
    for note in found.notes:
        if parts := hub_parts(note.ref):
            snapshots |= {(AT.snapshot(parts[0], note.commit), note.artifact)}
            refs[AT.hub_refs(parts[0]) / parts[1]] = note.commit
    links = {
        snapshot / file.path: AT.blob(file.blob.sha256)
        for snapshot, artifact in snapshots
        for file in MODELS[artifact].manifest.files
    }
    shown = {AT.hub / path for path in fs.files_under(AT.hub)}
    assert shown == links.keys() | refs.keys(), "the Hub's cache is not what is listed and noted"
    assert all(fs.same_file(path, blob) for path, blob in links.items()), "a snapshot shows something else"
    assert {path: fs.read_file(path).decode() for path in refs} == refs
    assert len(fs.list_dir(AT.hub)) == len({path.parts[3] for path in shown}), "a folder is left over"


def ids(found: Scan) -> set[ArtifactId]:
    return {artifact.id for artifact in found.artifacts}


def may_be_bad(content: bytes, promises: Promises) -> bool:
    """Nobody but the quarantine knows of the damage; until it is done, B may still be listed."""
    return content == BAD and promises.damaged and not promises.put_away


def check_before_start(fs: MemFs, promises: Promises) -> None:
    """What a replica could read through its mount while the daemon is not up yet."""
    if promises.put_away:
        for top in (AT.trees, AT.hub):
            shown = fs.files_under(top)
            assert all(fs.read_file(top / path) != BAD for path in shown), "bad content is shown again"


def check_work_goes_on(fs: MemFs, store: Store) -> None:
    for model in MODELS.values():
        if model is not B:  # B may hold damaged content that nobody has found yet
            fetch(store, fs, model, now=400.0)
    assert store.scrub_mark() in (ScrubMark(), SCRUBBED), "a torn mark is taken for one"
    store.put_claim(PIN)
    store.close()


# --- the replays ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story() -> Story:
    fs = MemFs()
    Store.open(ROOT, fs).close()  # opening for the first time has a test of its own
    story = Story(fs)
    story.run()
    return story


def explain(moment: Moment, number: int, fate: Fate) -> str:
    return f"before change {number} ({moment.step}), {type(fate).__name__}"


def replay(story: Story, look: Callable[[MemFs, Moment], None]) -> None:
    for number, moment in enumerate(story.moments):
        for fate in fates():
            try:
                look(moment.fs.after(fate), moment)
            except Exception as error:
                raise AssertionError(f"{explain(moment, number, fate)}: {error}") from error


def test_whatever_a_crash_leaves_is_right_and_promises_hold(story: Story) -> None:
    assert len(story.moments) > 150

    def look(fs: MemFs, moment: Moment) -> None:
        check_before_start(fs, moment.promises)
        store, found = start(fs)
        check(fs, found, moment.promises)
        check_work_goes_on(fs, store)

    replay(story, look)


def test_a_power_cut_after_a_killed_process_takes_nothing_back(story: Story) -> None:
    """A killed process leaves names that look durable and are not; what the next start builds on must be."""
    for number, moment in enumerate(story.moments):
        fs = moment.fs.copy()  # killed: everything is there, nothing more is synced
        store, found = start(fs)
        check(fs, found, moment.promises)
        shown = seen(found, moment.promises)
        for fate in (Fate(), *(Chance(seed) for seed in range(2))):
            after = fs.after(fate)
            _, again = start(after)
            try:
                check(after, again, shown)
            except AssertionError as error:
                raise AssertionError(f"{explain(moment, number, fate)}: {error}") from error
        check_work_goes_on(fs, store)
        after = fs.after(Fate())
        _, again = start(after)
        check(after, again, worked(shown))


def seen(found: Scan, before: Promises) -> Promises:
    """What was listed to somebody is as good as promised."""
    listed = {artifact.id for artifact in found.artifacts}
    claims = {claim.id: claim for claim in found.claims}
    return Promises(
        listed,
        MODELS.keys() - listed,
        claims,
        {PIN.id, OTHER_PIN.id} - claims.keys(),
        before.damaged,
        before.put_away,
        before.purging,
    )


def worked(shown: Promises) -> Promises:
    after = shown.copy()
    after.artifacts |= {A.id, LOOSE.id}
    after.gone -= {A.id, LOOSE.id}
    after.claims[PIN.id] = PIN
    after.ended.discard(PIN.id)
    return after


def test_a_crash_in_the_middle_of_recovery_is_recovered_from(story: Story) -> None:
    for number, moment in list(enumerate(story.moments))[::23]:
        for first in (Kill(), Chance(number)):
            fs = moment.fs.after(first)
            second_moments: list[MemFs] = []
            fs.before_change = lambda fs=fs, kept=second_moments: kept.append(fs.copy())  # type: ignore[misc]
            store, _ = start(fs)
            store.close()
            for later, crashed in enumerate(second_moments):
                after = crashed.after(Chance(later))
                try:
                    check(after, start(after)[1], moment.promises)
                except Exception as error:
                    raise AssertionError(
                        f"{explain(moment, number, first)}, then {later}: {error}"
                    ) from error


def test_a_crash_while_a_store_is_made_is_no_strangers_directory() -> None:
    fs, moments = MemFs(), list[MemFs]()
    fs.before_change = lambda: moments.append(fs.copy())
    Store.open(ROOT, fs).close()
    for number, crashed in enumerate(moments):
        if number > 20 and number % 32:  # most of these make one of 256 alike directories
            continue
        for fate in fates():
            after = crashed.after(fate)
            store, found = start(after)
            assert found.artifacts == () and found.problems == ()
            fetch(store, after, A)
            again = after.after(Fate())
            check(again, start(again)[1], Promises({A.id}))


def test_an_evicted_view_does_not_come_back_in_its_successors_place() -> None:
    fs = MemFs()
    store, _ = start(fs)
    fetch(store, fs, A)
    store.close()
    fs = fs.after(Kill())  # by now the kernel has written everything back by itself
    moments: list[MemFs] = []
    store, _ = start(fs)
    fs.before_change = lambda: moments.append(fs.copy())
    store.evict(A.id, A.digests)
    for killed in (*moments, fs.copy()):
        store, _ = start(killed)
        fetch(store, killed, A)
        after = killed.after(Fate())
        check(after, start(after)[1], Promises({A.id}))


def test_a_power_cut_after_a_killed_making_is_no_strangers_directory() -> None:
    for killed in moments_of_making(MemFs(), most=10):
        for crashed in moments_of_making(killed, most=10):
            start(crashed.after(Chance(1)))
            start(crashed.after(Losses()))


def moments_of_making(fs: MemFs, most: int) -> list[MemFs]:
    """Before each of the first changes that opening a store makes: VERSION and the first directories."""
    moments: list[MemFs] = []

    def keep() -> None:
        if len(moments) < most:
            moments.append(fs.copy())

    fs.before_change = keep
    Store.open(ROOT, fs).close()
    return moments


def test_a_file_system_that_ignores_syncs_is_found_out() -> None:
    """The replay notices a store that does not sync: it is worth something."""
    fs = MemFs()
    Store.open(ROOT, fs).close()
    fs = fs.after(Kill())
    fs.deaf = True
    story = Story(fs)
    story.run()
    last = story.moments[-1]
    after = last.fs.after(Fate())
    with pytest.raises(AssertionError, match="a promised artifact is gone"):
        check(after, start(after)[1], last.promises)
