"""Pictures with their masks at several budgets, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dynaconv.budget import set_budget_
from dynaconv.cost import collect_masks, ponder_map
from dynaconv.cost.masks import MaskCollection
from dynaconv.data import DataBundle, Keypoints, task_of

Gallery = dict[str, np.ndarray]


def build_gallery(
    model: nn.Module,
    bundle: DataBundle,
    targets: Sequence[float],
    *,
    count: int = 36,
    dense: nn.Module | None = None,
    indices: Sequence[int] | None = None,
    searched: int = 400,
) -> Gallery:
    """Pictures of the test split with masks, predictions and boxes, as gallery.npz holds them.

    Args:
        model: calibrated for `targets`.
        count: pictures; about a quarter of them are ones that the lowest budget gets wrong, where there are any; of
            keypoints, those of which a point is off.
        dense: baseline whose predictions are shown beside, of networks for classes.
        indices: choose the pictures yourself.
        searched: among how many test pictures the wrong answers are looked for.
    """
    test = bundle.test
    if indices is None:
        indices = _choose(model, bundle, min(targets), count, min(searched, len(test)))
    images, labels = test.__getitems__(list(indices))
    raw = test.images_uint8(list(indices)).permute(0, 2, 3, 1).contiguous()
    boxes, task = getattr(test, "boxes", None), task_of(test)
    points = isinstance(task, Keypoints)
    known = {"task": task, "truth": labels} if points else {"labels": labels.tolist()}
    gallery = gallery_of_images(model, images, raw.numpy(), targets, **known)
    if boxes is not None:
        gallery["boxes"] = boxes[list(indices)].numpy()
    if dense is not None and not points:
        with torch.inference_mode():
            gallery["dense_predictions"] = dense.eval()(images).argmax(1).numpy()
    return gallery


@torch.inference_mode()
def gallery_of_images(
    model: nn.Module,
    images: Tensor,
    images_uint8: np.ndarray,
    targets: Sequence[float | None],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    task: Keypoints | None = None,
    truth: Tensor | None = None,
) -> Gallery:
    """The same for any pictures.

    Args:
        images: [K, 3, H, W], normalised as the network expects; images_uint8: [K, H, W, 3], for drawing.
        targets: budgets; [None] draws a network that is not calibrated, at its trained threshold.
        names: file names; labels: true classes, -1 or None where unknown.
        task: of a network that answers with heat-maps; then there are also points [T, K, P, 2] (x, y in pixels), and a
            confidence is the mean height of a picture's heat-maps. truth: [K, P, 4] as `Keypoints` has labels.
    """
    model.eval()
    count = len(images)
    gallery: Gallery = {
        "images": np.asarray(images_uint8, dtype=np.uint8),
        "labels": np.asarray([-1] * count if labels is None else labels, dtype=np.int64),
        "targets": np.asarray([np.nan if t is None else t for t in targets], dtype=np.float64),
    }
    if names is not None:
        gallery["names"] = np.asarray([str(n) for n in names])
    if truth is not None:
        gallery["truth"] = truth.float().numpy()
    if task is not None:
        # The answer to every picture is the same: its keypoints.
        gallery["classes"] = np.asarray(["keypoints"])
    predictions, confidences, points = [], [], []
    for t, target in enumerate(targets):
        set_budget_(model, target)
        with collect_masks(model) as masks:
            outputs = model(images.contiguous(memory_format=torch.channels_last)).float()
        if task is None:
            confidence, predicted = outputs.softmax(1).max(1)
        else:
            confidence = outputs[:, -1].flatten(2).amax(2).mean(1).clamp(0, 1)
            predicted = torch.zeros(count, dtype=torch.int64)
            points.append(task.points(outputs[:, -1]).float().numpy())
        predictions.append(predicted.numpy())
        confidences.append(confidence.numpy())
        gallery["blocks"] = np.asarray(list(masks))
        gallery[f"ponder_{t}"] = ponder_map(masks, weighted=True).float().numpy()
        gallery[f"ratio_{t}"] = masks.conditional_ratio().float().numpy()
        for b, name in enumerate(masks):
            gallery[f"masks_{t}_{b}"] = _shown(masks, name).to(torch.uint8).numpy()
    if points:
        gallery["points"] = np.stack(points)
    gallery["predictions"] = np.stack(predictions).astype(np.int64)
    gallery["confidence"] = np.stack(confidences).astype(np.float32)
    return gallery


def _shown(masks: MaskCollection, name: str) -> Tensor:
    """Decisions as a map of 0 and 1, [K, h, w]; those about channels as stripes, a group of channels each."""
    channels = masks.channels.get(name)
    if channels is not None:
        return channels[:, :, 0, 0].unsqueeze(1)
    return masks[name].as_subclass(Tensor)[:, 0]


@torch.inference_mode()
def _choose(model: nn.Module, bundle: DataBundle, target: float, count: int, searched: int) -> list[int]:
    """Test pictures: the first `searched` are looked through, up to a quarter of the choice are wrong answers."""
    set_budget_(model, target)
    task = task_of(bundle.test)
    wrong, right = [], []
    for start in range(0, searched, 64):
        indices = list(range(start, min(start + 64, searched)))
        images, labels = bundle.test.__getitems__(indices)
        answers = model.eval()(images)
        for i, answer, label in zip(indices, answers, labels, strict=True):
            hits, possible = task.judge(answer[None], label[None])
            (right if hits == possible else wrong).append(i)
    chosen_wrong = wrong[: max(0, max(count // 4, count - len(right)))]
    return sorted(right[: count - len(chosen_wrong)] + chosen_wrong)
