import itertools
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, random_split

from config import UsageError, config
from dataset import ImageDataset, channel_statistics, load_datasets, make_augmentation, make_loader
from parts.transforms import RepeatableCompose, SquareHole
from tests.conftest import equal

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PROBABILITIES = [name for name in vars(config) if name.endswith("probability")]
NEVER, HALF, ALWAYS = (dict.fromkeys(PROBABILITIES, probability) for probability in (0.0, 0.5, 1.0))


def copies(count=50, seed=0, **settings):
    """A dataset of the same picture, without any symmetry, `count` times, each with its index as its label."""
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8).repeat(count, axis=0)
    augmentation = make_augmentation(replace(config, **ALWAYS | settings), MEAN)
    return ImageDataset(images, np.arange(count), ["a picture"], MEAN, STD, augmentation, seed)


def read_on(batches):
    """All images and labels of the next pass, or of what is left of one."""
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def read(loader, epoch=1):
    """All images and labels of an epoch."""
    loader.dataset.set_epoch(epoch)
    return read_on(loader)


def test_item_is_a_normalized_image_and_a_number_and_a_list_of_indices_gives_a_batch_of_them():
    dataset = copies(**NEVER)
    expected = (dataset.images[7] / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(dataset[7][0], expected.permute(2, 0, 1).float(), atol=1e-5, rtol=0)
    assert (dataset[7][1], type(dataset[7][1])) == (7, int)
    dataset = copies()
    images, labels = dataset[[4, 9, 4]]
    assert torch.equal(images, torch.stack([dataset[index][0] for index in (4, 9, 4)]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), labels.dtype) == ([4, 9, 4], torch.int64)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[[4, 9, 4]][0], images)
    assert torch.equal(dataset[0, [4, 9, 4]][0], images)  # of the epoch that is asked for


def test_dataset_is_a_sequence_and_every_loader_of_torch_gives_the_same_images():
    dataset = copies()
    dataset.set_epoch(1)
    here = torch.stack([image for image, _ in dataset])
    assert torch.equal(dataset[-1][0], here[49])
    part, _ = random_split(dataset, [20, 30])
    plain = DataLoader(dataset, 64), DataLoader(dataset, 64, shuffle=True), DataLoader(dataset, 16, num_workers=1)
    for loader, count in [(loader, 50) for loader in plain] + [(DataLoader(part, 8, shuffle=True), 20)]:
        images, labels = read_on(loader)
        assert len(labels.unique()) == count
        assert torch.equal(images, here[labels])
    assert torch.equal(read(make_loader(dataset, 16))[0], here)
    assert torch.equal(dataset.images, copies().images)  # the images in memory stay as they are


def test_loader_of_something_else_says_what_to_use():
    with pytest.raises(TypeError, match=r"for a Subset use torch's DataLoader"):
        make_loader(Subset(copies(), [3, 5]), 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_pass_is_the_next_epoch_from_where_set_epoch_left_it(num_workers, monkeypatch):
    if num_workers == 0:  # no shared memory is needed
        monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("/dev/shm is not there")))
    epochs = [read(make_loader(copies(), 16, shuffle=True), epoch) for epoch in range(8)]
    loader = make_loader(copies(), 16, shuffle=True, num_workers=num_workers)
    assert equal([read_on(loader), read_on(loader)], epochs[:2])  # nobody has ever called set_epoch
    next(iter(loader))  # epoch 2, left half-way
    assert equal(read_on(loader), epochs[3])
    loader.dataset.set_epoch(6)
    loader.dataset.set_epoch(5)
    assert equal(read_on(loader), epochs[5])
    batches = iter(loader)
    first = next(batches)
    loader.dataset.set_epoch(1)  # in the middle of epoch 6, which goes on as it began
    assert equal(read_on([first, *batches]), epochs[6])
    assert equal(read_on(loader), epochs[1])


@pytest.mark.parametrize(("workers", "method"), [(2, "fork"), (1, "spawn")])
def test_same_seed_same_batches_with_any_number_and_kind_of_workers(workers, method):
    def noisy(num_workers):
        dataset, others = copies(), [A.ElasticTransform(p=1), A.ColorJitter(p=1), A.Solarize(p=1)]
        added = A.SomeOf(others, n=2), A.GaussNoise(p=1)
        dataset.augmentation = RepeatableCompose([*dataset.augmentation.transforms, *added])
        return make_loader(dataset, 8, True, num_workers)

    here, there = noisy(0), noisy(workers)
    there.multiprocessing_context = method
    for _ in range(2):  # the workers go on to the second epoch
        assert equal(list(here), list(there))


@pytest.mark.parametrize("added", [[], [A.GaussNoise(p=1)]], ids=["ours", "of numpy's numbers"])
def test_order_and_augmentation_differ_between_images_epochs_workers_and_seeds(added):
    passes = []
    for seed in (0, 1, 2**63 - 1):
        loader = make_loader(copies(64, seed), 16, shuffle=True, num_workers=2)
        loader.dataset.augmentation = RepeatableCompose(added) if added else loader.dataset.augmentation
        passes += [read(loader, epoch) for epoch in (1, 11)]  # epoch 1, image 11 is not epoch 11, image 1
    images, labels = (torch.stack(parts) for parts in zip(*passes, strict=True))
    assert labels.sort().values.tolist() == [[*range(64)]] * 6
    assert (len(labels.unique(dim=0)), len(images.flatten(0, 1).flatten(1).unique(dim=0))) == (6, 6 * 64)


def test_loader_leaves_torchs_random_numbers_to_the_dropout():
    numbers = []
    for passes in (0, 1):
        torch.manual_seed(0)
        numbers += [[list(make_loader(copies(), 16, shuffle=True)) for _ in range(passes)], torch.rand(1).item()]
    assert numbers[1] == numbers[3]


def test_flip_and_hole_are_independent_and_the_hole_has_the_mean_colour():
    """Each happens half the time, together a quarter: the library's own seeding would tie them."""
    images, _ = copies(2000, **HALF | {"shift_scale_rotate_probability": 0.0}, hole_size=15)[[*range(2000)]]
    picture, _ = copies(1, **NEVER)[0]
    same, mirrored = ((images == other).float().mean(dim=(1, 2, 3)) for other in (picture, picture.flip(2)))
    filled = (images.abs() < 0.02).all(dim=1).sum(dim=(1, 2))  # the mean colour is 0 when normalized
    assert filled.unique().tolist() == [0, 15 * 15]
    flipped, hole = mirrored > same, filled > 0
    for event in (flipped, hole, flipped ^ hole):  # if independent, the third is as likely as the others
        assert 0.45 < event.float().mean() < 0.55


def test_limits_are_those_of_albumentations():
    limits = {"translate_percent": (-0.25, 0.25), "scale": (0.7, 1.3), "rotate": (-40, 40), "keep_ratio": True}
    affine = A.Affine(**limits, border_mode=cv2.BORDER_REFLECT_101, p=0.5)
    settings = HALF | {"coarse_dropout_probability": 0.0, "shift_limit": 0.25, "scale_limit": 0.3, "rotate_limit": 40.0}
    ours, theirs = copies(**settings), copies()
    theirs.augmentation = RepeatableCompose([A.HorizontalFlip(p=0.5), affine])
    difference = (ours[[*range(50)]][0] - theirs[[*range(50)]][0]).abs() * torch.tensor(STD)[:, None, None] * 255
    assert difference.mean() < 0.01


def parts_of(dataset, shuffle, world_size):
    """For each process, the labels of each of its batches of twelve altogether."""
    loaders = [make_loader(dataset, 12, shuffle, rank=rank, world_size=world_size) for rank in range(world_size)]
    return [[labels.tolist() for _, labels in loader] for loader in loaders if not dataset.set_epoch(1)]


@pytest.mark.parametrize("count", [48, 53, 49])  # in the last case, one process alone has an image of the last batch
def test_processes_share_each_batch_train_on_what_divides_and_validate_each_image_once(count):
    for shuffle in (True, False):
        [whole], parts = (parts_of(copies(count), shuffle, world_size) for world_size in (1, 3))
        for batch, *shares in itertools.zip_longest(whole, *parts, fillvalue=[]):
            together = [label for share in shares for label in share]
            if shuffle:
                assert {*map(len, shares)} == {len(batch) // 3}
                assert len({*together} & {*batch}) == len(together)
            else:
                assert sorted(together) == batch


def test_hole_is_equally_likely_everywhere():
    pipeline, places = RepeatableCompose([SquareHole(30, fill=(9, 8, 7), p=1.0)]), Counter()
    for number in range(1800):
        pipeline.set_key(number)
        places[pipeline(image=np.zeros((32, 32, 3), np.uint8))["image"].tobytes()] += 1
    assert (len(places), min(places.values()) > 150, max(places.values()) < 250) == (3 * 3, True, True)


def test_channel_without_any_variation_can_be_divided_by_its_deviation():
    assert channel_statistics(np.full((4, 32, 32, 3), 51, dtype=np.uint8)) == ((0.2,) * 3, (1.0,) * 3)


def test_class_that_would_have_no_image_on_one_side_or_no_other_beside_it_is_refused(tmp_path):
    for wrong in ({"valid_split": 0.001}, {"valid_split": 0.999}, {"train_images": 4}):
        with pytest.raises(UsageError, match=r"a class has no image left .+: change valid_split or train_images"):
            load_datasets(replace(config, dataset="shapes", **wrong))
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "cat" / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        load_datasets(replace(config, dataset="folder", data_dir=str(tmp_path)))


@pytest.mark.parametrize(("valid_split", "sizes"), [(0.0, (1200, 300, 300)), (0.1, (1080, 120, 300))])
def test_all_parts_are_normalized_alike_and_only_the_training_images_are_augmented(valid_split, sizes):
    data = load_datasets(replace(config, dataset="shapes", valid_split=valid_split, **ALWAYS))
    for part, size in zip(data, sizes, strict=True):
        assert part.labels.bincount().tolist() == [size // 10] * 10
        np.testing.assert_allclose(part.mean, data.train.images.numpy().mean(axis=(0, 1, 2)) / 255)
        np.testing.assert_allclose(part.std, data.train.images.numpy().std(axis=(0, 1, 2)) / 255)
        assert torch.equal(part[1, [0, 1]][0], part[2, [0, 1]][0]) == (part is not data.train)
    assert torch.equal(data.valid.images, data.test.images) == (valid_split == 0)


def test_held_out_images_are_not_trained_on_and_the_same_ones_whatever_the_seed():
    settings = replace(config, dataset="shapes", valid_split=0.2)
    (train, held_out, _), (again, others, _) = (load_datasets(replace(settings, seed=seed)) for seed in (0, 1))
    assert len(torch.cat([train.images, held_out.images]).flatten(1).unique(dim=0)) == 1200
    assert (torch.equal(held_out.images, others.images), train.seed, again.seed) == (True, 0, 1)


def test_part_of_the_training_images_is_of_each_class_alike_and_the_same_for_every_seed():
    some, same = (load_datasets(replace(config, dataset="shapes", train_images=200, seed=seed)) for seed in (0, 1))
    assert np.bincount(some.train.labels).tolist() == [20] * 10
    assert equal(some.train.images, same.train.images)
    assert len(some.test) == 300
    assert len(load_datasets(replace(config, dataset="shapes", train_images=1199)).train) == 1200  # rounded
    with pytest.raises(UsageError, match="train_images must be at most 1,200"):
        load_datasets(replace(config, dataset="shapes", train_images=1201))
    with pytest.raises(UsageError, match=r"image_size must be that of the images of shapes, \(32, 32\), not 64"):
        load_datasets(replace(config, dataset="shapes", image_size=64))


def test_labels_of_any_integers_and_names_of_any_kind_will_do():
    images = np.zeros((2, 3, 32, 32), np.uint8).transpose(0, 2, 3, 1)
    data = ImageDataset(images, np.uint8([0, 1]), [0, 1], MEAN, STD)
    assert (data.labels.dtype, data.images.is_contiguous(), data.class_names) == (torch.int64, True, ["0", "1"])


def test_images_labels_and_augmentations_that_are_none_are_refused_in_one_line():
    images, labels = np.zeros((4, 32, 32, 3), dtype=np.uint8), np.arange(4)
    for wrong in (images / 255, images.transpose(0, 3, 1, 2), images[:3]):
        with pytest.raises(UsageError, match=r"images must be \(N, H, W, 3\) uint8, RGB, with N labels; not .+"):
            ImageDataset(wrong, labels, "abcd", MEAN, STD)
    with pytest.raises(UsageError, match="augmentation must be a RepeatableCompose"):
        ImageDataset(images, labels, "abcd", MEAN, STD, A.Compose([A.HorizontalFlip()]))
