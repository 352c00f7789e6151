"""Images in: folders, packed arrays, generated pictures, and the order in which training sees them.

    build_dataset(path) -> dataset[i]: uint8 (3, S, S)
                               |
    train_loader: one endless stream of shuffled epochs, any step of which can be resumed at
    val_loader:   every image once, in order        |
                                                    v
                               batches, uint8 (B, 3, S, S)

Datasets return bytes: a quarter of the traffic of float32 between workers, host and GPU.
"""

import functools
import json
import operator
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from synthetic import SyntheticDataset
from util import StopSignals, from_all, rank

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# fmt: off
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
)
# fmt: on
SYNTHETIC_TRAIN, SYNTHETIC_VAL = 12_800, 256


# --------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------
class UnreadableImage(ValueError):
    """A file that is named like an image and cannot be decoded as one.

    Takes one string, because a DataLoader raises a worker's error again as `type(text)`, where the
    text is the worker's whole traceback; `util.one_line` finds the message in it.
    """


_UPRIGHT = {  # EXIF orientation -> what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damage to the EXIF block is no damage to the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; 16-bit grey is scaled to 8 bits, transparency is laid over white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("grey levels outside 0..65535; save it with 8 or 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB: upright, its first frame, transparency over white.

    Raises:
        UnreadableImage: one line that names the file; also for more than 178,956,970 pixels, the
            size from which Pillow suspects a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at each reading of the several damaged EXIF blocks in ImageNet.
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                if file.width * file.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"{file.width}x{file.height} pixels are too many")
                file.load()  # before EXIF: reading that loads a PNG, and hides its errors
                turn = _UPRIGHT.get(_orientation(file))
                return _to_rgb(file if turn is None else file.transpose(turn))
    except Exception as error:  # on a damaged file, Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(
            f"cannot read image {path}: {reason}; remove it or repair it"
        ) from error


def fit(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, then the centre square; rounds as torchvision's transforms do."""
    width, height = image.size
    short = min(width, height)
    if max(width, height) > 64 * short:  # a strip: do not enlarge, at any cost, what is cut off
        keep_x, keep_y = min(width, 64 * short), min(height, 64 * short)
        left, top = (width - keep_x) // 2, (height - keep_y) // 2
        image = image.crop((left, top, left + keep_x, top + keep_y))
        width, height = keep_x, keep_y
    if short != size:
        width, height = size * width // short, size * height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def list_files(root: Path, suffixes: Sequence[str]) -> tuple[list[str], str | None]:
    """Paths below a folder, to any depth, of the files with these suffixes, in order; one other.

    Links are followed, hidden files and folders are skipped.

    Raises:
        ValueError: for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list folder '{error.filename}': {error.strerror}") from error

    paths, other, seen = [], None, set()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to where the walk has been
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Sorted, so that what is seen first does not depend on the file system.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(name for name in files if not name.startswith(".")):
            path = name if below == "." else f"{below}/{name}"
            if name.lower().endswith(tuple(suffixes)):
                paths.append(path)
            else:
                other = other or path
    return sorted(paths), other


def find(inputs: Sequence[str], suffixes: Sequence[str]) -> list[tuple[Path, Path]]:
    """(file, its path below the folder that was given) of every input, in order.

    Inputs are files, with any suffix, and folders, which are searched by `list_files`.

    Raises:
        ValueError: an input does not exist, or a folder holds no such file.
    """
    found = []
    for path in map(Path, inputs):
        if path.is_dir():
            below, _ = list_files(path, suffixes)
            if not below:
                raise ValueError(f"folder {path} holds no file named {' '.join(suffixes)}")
            found += [(path / file, Path(file)) for file in below]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise ValueError(f"{path} does not exist: give files or folders")
    return found


def some(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly over all of them; all for None."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


class ImageFolderDataset(Dataset):
    """All images below a folder, nested in any way, in the order of their relative paths.

    Item i is uint8 (3, img_size, img_size): upright, RGB, the short side resized (bilinear,
    antialiased), the centre cropped; an image that has the size already keeps its very bytes.
    Animations give their first frame, transparent images lie on white, hidden files are skipped.

    Raises ValueError for a folder without images, `UnreadableImage` for a file that is none.
    """

    def __init__(self, root: str | os.PathLike, img_size: int) -> None:
        self.root, self.img_size = Path(root), img_size
        if img_size < 1:
            raise ValueError(f"img_size is {img_size}: it must be at least 1")
        mend = f"give a folder with images ({' '.join(IMAGE_SUFFIXES)}) in it, or 'synthetic'"
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"image folder '{root}' {what}: {mend}")
        paths, other = list_files(self.root, IMAGE_SUFFIXES)
        if not paths:
            what = f"holds no image (but, for example, '{other}')" if other else "is empty"
            raise ValueError(f"image folder '{root}' {what}: {mend}")
        # One block of bytes: a million Python strings would be copied into every worker, little by
        # little, as their reference counts are touched.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path of item `index` below the folder."""
        return os.fsdecode(self._paths[index])

    def path(self, index: int) -> Path:
        """The file behind item `index`."""
        return self.root / self.name(index)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = np.array(fit(read_image(self.path(index)), self.img_size))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# --------------------------------------------------------------------------------------
# Packed arrays
# --------------------------------------------------------------------------------------
PACK_FORMAT, PACK_VERSION = "rfsq packed images", 1
PACK_INDEX, PACK_UNFINISHED = "index.json", "unfinished.json"
PACK_SHARD = "shard-{:05d}.npy"
MAX_MAPPED = 512


def is_packed(root: str | os.PathLike) -> bool:
    """Whether `scripts/pack_images.py` wrote into this folder: finished, cut off or damaged."""
    root = Path(root)
    if any((root / name).is_file() for name in (PACK_UNFINISHED, PACK_SHARD.format(0))):
        return True
    try:  # folders of images may have an index.json of their own
        return json.loads((root / PACK_INDEX).read_bytes()).get("format") == PACK_FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_pack(root: str | os.PathLike, name: str = PACK_INDEX) -> dict:
    """The index of a packed folder, once its shards are seen to be there in full.

    Raises ValueError if it is unfinished, damaged, or of a newer version of the format.
    """
    path = Path(root) / name
    if not is_packed(root):
        raise ValueError(f"'{root}' is no packed folder: scripts/pack_images.py SRC OUT makes one")
    if not path.is_file():
        raise ValueError(
            f"'{root}' is not packed to its end ({name} is missing): run the same "
            "scripts/pack_images.py command again, it continues where it was"
        )
    again = f"copy the folder again, or remove '{root}' and pack again"
    try:
        index = json.loads(path.read_bytes())
        if index["format"] == PACK_FORMAT and index["version"] > PACK_VERSION:
            raise ValueError(
                f"{path} has version {index['version']} of the format, this code reads up to "
                f"{PACK_VERSION}: use the version of the project that wrote it"
            )
        counts = [shard["count"] for shard in index["shards"]]
        full, sound = index["images_per_shard"], index["format"] == PACK_FORMAT
        sound &= isinstance(index["img_size"], int) and sum(counts) == index["count"]
        sound &= all(n == full for n in counts[:-1]) and all(0 < n <= full for n in counts[-1:])
        sizes = [(Path(root) / shard["file"], shard["bytes"]) for shard in index["shards"]]
    except (OSError, json.JSONDecodeError, UnicodeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is no index of packed images, or is damaged: {again}")
    for shard, size in sizes:
        found = shard.stat().st_size if shard.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
            raise ValueError(f"shard {shard} {what}: {again}")
    return index


class PackedDataset(Dataset):
    """What `scripts/pack_images.py` made of a folder: the same images in the same order.

    Item i is uint8 (3, img_size, img_size), the very bytes that `ImageFolderDataset` gives.

    Raises ValueError for another img_size than packed, and where `read_pack` does.
    """

    def __init__(self, root: str | os.PathLike, img_size: int) -> None:
        index = read_pack(root)
        packed = index["img_size"]
        if packed != img_size:
            raise ValueError(
                f"'{root}' holds images of {packed}x{packed} pixels, asked is {img_size}x"
                f"{img_size}: use --img-size {packed}, or pack again into another folder with "
                f"`scripts/pack_images.py --img-size {img_size}`"
            )
        self.root, self.img_size = Path(root), img_size
        self._full, self._count = index["images_per_shard"], index["count"]
        self._shards = [(shard["file"], shard["count"]) for shard in index["shards"]]
        self._mapped: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:
        # Pickled, a map is a copy of its data: each process maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return self._count

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            file, count = self._shards[number]
            if len(self._mapped) >= MAX_MAPPED:  # each holds a file open, and 1,024 may be
                self._mapped.clear()
            try:
                shard = np.load(self.root / file, mmap_mode="r", allow_pickle=False)
                wanted = (count, 3, self.img_size, self.img_size)
                if shard.dtype != np.uint8 or shard.shape != wanted:
                    raise ValueError(f"{shard.dtype} {shard.shape} is not what the index says")
            except Exception as error:  # a damaged header can raise nearly anything
                raise ValueError(
                    f"cannot read shard {self.root / file}: {' '.join(str(error).split())}; copy "
                    f"the folder again, or remove '{self.root}' and pack again"
                ) from error
            self._mapped[number] = np.asarray(shard)  # views of a np.memmap are slow to make
        return self._mapped[number]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A batch, uint8 (B, 3, S, S). A DataLoader asks for it in place of B single items."""
        batch = np.empty((len(indices), 3, self.img_size, self.img_size), np.uint8)
        for image, index in zip(batch, indices, strict=True):
            index = operator.index(index)
            if not -self._count <= index < self._count:
                raise IndexError(f"index {index}: '{self.root}' holds {self._count} images")
            shard, row = divmod(index % self._count, self._full)
            image[:] = self._shard(shard)[row]
        return torch.from_numpy(batch)


class SkipCorrupt(Dataset):
    """A folder's images without those that cannot be read, which are counted.

    In training, the next readable image takes the place of one that is not, so that batches stay
    whole; in validation it is None, which the loader leaves out.
    """

    def __init__(self, images: ImageFolderDataset, train: bool) -> None:
        self.images, self.train = images, train
        self.bad = torch.zeros(len(images), dtype=torch.bool).share_memory_()  # set by workers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | None:
        for i in range(index, index + (len(self) if self.train else 1)):
            try:
                return self.images[i % len(self)]
            except UnreadableImage:
                self.bad[i % len(self)] = True
        if self.train:
            raise ValueError("none of the training images can be read: give another folder")
        return None

    def skipped(self) -> list[str]:
        """The files that could not be read so far."""
        return [str(self.images.path(i)) for i in self.bad.nonzero()[:, 0].tolist()]


def build_dataset(
    path: str | os.PathLike, img_size: int, seed: int, train: bool, skip_corrupt: bool = False
) -> Dataset:
    """The dataset that a path names: 'synthetic', or a folder of images, packed or not.

    `seed` is for generated images alone, `skip_corrupt` for folders that are not packed.
    """
    if os.fspath(path) == "synthetic":
        length = SYNTHETIC_TRAIN if train else SYNTHETIC_VAL
        # One validation set for all seeds: the spread over seeds is the training's.
        return SyntheticDataset(img_size, seed if train else 0, length, stream=0 if train else 1)
    if is_packed(path):
        return PackedDataset(path, img_size)
    images = ImageFolderDataset(path, img_size)
    return SkipCorrupt(images, train) if skip_corrupt else images


# --------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------
class StreamSampler(Sampler[list[int]]):
    """Batches of indices for one process, cut from one stream of shuffled epochs.

        epoch 0: a permutation   epoch 1: another one
        |-----------------------|-----------------------|----
        | step 0  | step 1  | step 2  | step 3  | step 4  |        global batch
        | r0 | r1 | r0 | r1 | r0 | r1 | r0 | r1 | r0 | r1 |        batch_size each

    Every image comes once an epoch, no batch is short, and the stream depends on (size, seed)
    alone: not on where it is entered (`start_step`), nor on how many processes share a global
    batch. `steps` is the last step of the run, so that `steps - start_step` batches remain.
    With `endless`, indices count up without end instead, one new image after the other.

    Raises ValueError if one global batch is larger than the set, unless `endless`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank}, world_size {world_size}: "
                "needed are batch_size >= 1 and 0 <= rank < world_size"
            )
        if batch_size * world_size > size and not endless:
            raise ValueError(
                f"a global batch of {batch_size * world_size} images ({batch_size} x {world_size} "
                f"processes) is larger than the training set of {size}: lower the batch size"
            )
        self.size, self.batch_size, self.seed, self.steps = size, batch_size, seed, steps
        self.start_step, self.rank, self.world_size = start_step, rank, world_size
        self.endless = endless

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order of one epoch, int64 (size,)."""
        # Hashed, as with seed + epoch the second epoch of seed 0 would be the first of seed 1.
        key = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(int(key)))

    def __iter__(self) -> Iterator[list[int]]:
        order: dict[int, torch.Tensor] = {}
        for step in range(self.start_step, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            last = first + self.batch_size
            if self.endless:
                yield list(range(first, last))
                continue
            epochs = range(first // self.size, (last - 1) // self.size + 1)  # one, or two
            order = {e: order[e] if e in order else self.permutation(e) for e in epochs}
            batch: list[int] = []
            for epoch in epochs:
                start = epoch * self.size
                batch += order[epoch][max(first - start, 0) : last - start].tolist()
            yield batch


def _collate(batch: torch.Tensor | list) -> torch.Tensor | None:
    """Items to a batch, or None; a dataset with `__getitems__` has made the batch already."""
    if isinstance(batch, torch.Tensor):
        return batch
    batch = [image for image in batch if image is not None]
    return default_collate(batch) if batch else None


def _leave_signals_to_main(deferred: torch.Tensor, worker: int) -> None:
    # A scheduler sends its signals to all processes; the training process finishes its step, for
    # which it needs its workers, and ends them itself.
    def exit_unless_deferred(number: int, frame: object) -> None:
        if not deferred:
            os._exit(0)  # PyTorch would report a worker that is killed as an error

    for number in StopSignals.SIGNALS:
        signal.signal(number, exit_unless_deferred)


def _loader(
    dataset: Dataset,
    num_workers: int,
    device: torch.device | str,
    stop: StopSignals | None,
    **options: object,
) -> DataLoader:
    # A DataLoader draws a number from its generator whenever it is started: one of its own keeps
    # the global random state, and with it a resumed run, out of this. PyTorch itself gives each
    # worker one thread.
    deferred = (stop or StopSignals()).deferred
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=functools.partial(_leave_signals_to_main, deferred),
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def train_loader(
    dataset: Dataset,
    batch_size: int,
    steps: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    stop: StopSignals | None = None,
) -> DataLoader:
    """This process's batches, uint8 (batch_size, 3, S, S), of steps start_step .. steps - 1.

    While `stop` defers signals, the loading processes ignore them.
    """
    batches = StreamSampler(
        len(dataset),
        batch_size,
        seed,
        steps=steps,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
        endless=getattr(dataset, "endless", False),
    )
    return _loader(dataset, num_workers, device, stop, batch_sampler=batches)


def val_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    stop: StopSignals | None = None,
) -> DataLoader:
    """This process's share, images rank, rank + world_size, ..., in order; it may be empty."""
    share = range(rank, len(dataset), world_size)
    return _loader(dataset, num_workers, device, stop, sampler=share, batch_size=batch_size)


def skipped_images(*datasets: Dataset) -> list[str]:
    """The files that any process left out because they could not be read. A collective."""
    own = [name for images in datasets for name in getattr(images, "skipped", list)()]
    names = sorted(set().union(*from_all(own)))
    if names and rank() == 0:
        more = f" and {len(names) - 3} more, named in results.json" if len(names) > 3 else ""
        print(f"{len(names)} images skipped: {', '.join(names[:3])}{more}", flush=True)
    return names
