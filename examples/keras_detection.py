"""Detection in Keras on TensorFlow: real handwriting in composed scenes, with a box loss that explodes.

    KERAS_BACKEND=tensorflow python examples/keras_detection.py
    KERAS_BACKEND=tensorflow python examples/keras_detection.py --control clip

The task of `gradsplit compare detection`: a class head and a box head on one stem, box errors in pixels, exponentiated
sizes. `split` is the only line that differs between the two. The score is the mean over the objects of 300 test scenes
of IoU x (class right). Expected: `score 0.273`, with a global clip `score 0.105`; about a minute on 2 cores.
"""

from __future__ import annotations

import argparse

import keras
import torch
from keras import layers, ops

import gradsplit as gs
from gradsplit.integrations.keras import SplitCallback, split
from gradsplit.lab.workloads.detection import CELL, NUM_TEST, NUM_TRAIN, SIZE
from gradsplit.lab.workloads.detector import cell_centres, overlap
from gradsplit.lab.workloads.scenes import BACKGROUND, Scenes, digit_scenes

CENTRES = cell_centres(SIZE // CELL, SIZE // CELL, CELL, torch.device("cpu")).numpy()


def detector(width: int = 16) -> keras.Model:
    """Four raw box numbers and eleven logits a cell of 8 x 8 pixels."""

    def stage(h, units, strides=1):
        return layers.Conv2D(units, 3, strides, "same", activation="relu", kernel_initializer="he_normal")(h)

    images, wide = keras.Input((SIZE, SIZE, 1)), 2 * width
    h = stage(stage(stage(images, width, 2), width, 2), wide, 2)
    small = keras.initializers.RandomNormal(stddev=0.01)
    boxes = layers.Conv2D(4, 1, kernel_initializer=small, name="box_head")(stage(stage(h, wide), wide))
    logits = layers.Conv2D(BACKGROUND + 1, 1, kernel_initializer=small, name="class_head")(stage(stage(h, wide), wide))
    return keras.Model(images, layers.Concatenate()([boxes, logits]))


def centres_and_sizes(raw):
    """Raw box numbers to (cx, cy, w, h) in pixels; sizes are exponentiated without a clamp, as first written."""
    return ops.concatenate([CENTRES + CELL * raw[..., :2], CELL * ops.exp(raw[..., 2:4])], -1)


def detection_loss(target, predicted):
    """Cross-entropy over owned cells and over background cells, and mean square box error in pixels."""
    label = ops.cast(target[..., 4], "int32")
    owned = ops.cast(label != BACKGROUND, "float32")
    count, rest = ops.maximum(ops.sum(owned), 1.0), ops.sum(1.0 - owned)
    entropy = keras.losses.sparse_categorical_crossentropy(label, predicted[..., 4:], from_logits=True)
    low, high = target[..., :2], target[..., 2:4]
    # Cells without an object have no box: their error is masked before it is squared.
    error = (centres_and_sizes(predicted) - ops.concatenate([(low + high) / 2, high - low], -1)) * owned[..., None]
    classes = ops.sum(entropy * owned) / count + ops.sum(entropy * (1.0 - owned)) / rest
    return classes + ops.sum(ops.square(error)) / (4.0 * count)


def arrays_of(scenes: Scenes):
    """Images (n, h, w, 1), and per cell box and label (n, cells, cells, 5)."""
    target = torch.cat([scenes.boxes, scenes.labels[..., None].float()], -1)
    return scenes.images.permute(0, 2, 3, 1).numpy(), target.numpy()


def score(model: keras.Model, scenes: Scenes) -> float:
    """Mean over all objects of IoU at the object's own cell x (class right there)."""
    predicted = torch.from_numpy(model.predict(arrays_of(scenes)[0], batch_size=100, verbose=0).copy())
    box = torch.from_numpy(ops.convert_to_numpy(centres_and_sizes(predicted.numpy())).copy())
    corners = torch.cat([box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2], -1)
    owned = scenes.labels != BACKGROUND
    right = predicted[..., 4:-1].argmax(-1)[owned] == scenes.labels[owned]
    return float((overlap(corners[owned], scenes.boxes[owned]) * right).mean())


def main() -> None:
    """Train, and print the score on scenes whose digits no training scene shows."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--control", choices=["split", "clip"], default="split")
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--epochs", type=int, default=8)
    chosen = options.parse_args()

    keras.utils.set_random_seed(0)
    train, test = digit_scenes(SIZE, CELL, 3, NUM_TRAIN, NUM_TEST)
    if chosen.control == "split":
        optimizer = split(keras.optimizers.SGD(chosen.lr, momentum=0.9), budget=gs.RelativeStep(0.03))
        callbacks = [SplitCallback(verbose=1)]
    else:
        optimizer = keras.optimizers.SGD(chosen.lr, momentum=0.9, global_clipnorm=1.0)
        callbacks = []
    model = detector()
    model.compile(optimizer, detection_loss, jit_compile=False)
    model.fit(*arrays_of(train), batch_size=32, epochs=chosen.epochs, verbose=2, callbacks=callbacks)
    print(f"score {score(model, test):.3f}")


if __name__ == "__main__":
    main()
