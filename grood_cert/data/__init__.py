"""Image sets, named by short specs, and the split of an experiment into its parts.

A spec is ``SOURCE[:CLASSES]``. Sources are

* built in: ``digits``, ``photo-patches``, ``uniform-noise``, ``gaussian-noise``, ``smooth-noise``;
* sets that torchvision reads from ``--data-dir``: ``mnist``, ``emnist-letters``, ``cifar10``, ``svhn``, ``dtd``, ...;
* folders of pictures of the OOD literature under ``--data-dir``: ``lsun-c``, ``lsun-r``, ``isun``, ``places365``,
  ``inaturalist``, ``sun``, and ``imagenet``;
* a file ``images.npy`` or ``images.npz``, MedMNIST's and Keras's included (``train_images``, ``x_train``, ...);
* MNIST's own files, ``train-images-idx3-ubyte`` with its labels beside it, packed with gzip or not, or their folder;
* ``hf:FOLDER``, what ``save_to_disk`` of Hugging Face's ``datasets`` wrote;
* ``shard.tar`` or ``shard-{000..012}.tar`` of webdataset: ``KEY.png`` with ``KEY.cls`` or ``KEY.json``;
* a picture file;
* a folder of pictures, or ``FOLDER@LIST`` for those of its class folders that a list names, ``FOLDER@!LIST`` for all
  others. LIST is a text file, one class folder a line, or ``imagenet-10``, the ten ID classes of the GReg paper:
  ``imagenet@imagenet-10`` is then the ID set and ``imagenet@!imagenet-10`` the auxiliary outliers.

A source may come with splits: folders, or names in a file, such as train, val (valid, validation, eval) and test. The
train split is trained on, the validation split calibrates where there is a test split too and is the test otherwise.
OOD sets are the test, the auxiliary set is the train split. ``data.test`` and ``data.calibration`` name sets of their own.

Every set comes out as float32 (N, C, H, W) with pixels in [0, 1]. Small sets are tensors; sets of more than a gigabyte
are read as they are indexed, from the mapped file or the pictures (`StoredImages`).
"""

from grood_cert.data.experiment import Evaluation, Experiment, experiment_of, load_evaluation, load_experiment
from grood_cert.data.images import ImageSet, StoredImages
from grood_cert.data.sources import load_pictures, load_set, splits_of
from grood_cert.data.spec import FOLDERS, NOISE, SOURCES, TORCHVISION, parse_spec

__all__ = [
    "FOLDERS",
    "NOISE",
    "SOURCES",
    "TORCHVISION",
    "Evaluation",
    "Experiment",
    "ImageSet",
    "StoredImages",
    "experiment_of",
    "load_evaluation",
    "load_experiment",
    "load_pictures",
    "load_set",
    "parse_spec",
    "splits_of",
]
