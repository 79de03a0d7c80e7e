"""Compress a network of your own: a plain torch module, data as tensors or as DataLoaders.

Run it with:  python examples/own_model.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autocompress as ac

torch.manual_seed(0)

# Each part of the data is a pair of tensors (x, y) or a DataLoader of such batches. Three parts are needed:
# recovery trains on the first, the search scores trials on the second, the answer is tested on the third.
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
y = torch.tensor(labels)
train, rest = train_test_split(range(len(y)), train_size=0.5, stratify=y, random_state=0)
val, test = train_test_split(rest, train_size=0.5, stratify=y[rest], random_state=0)
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=64, shuffle=True, drop_last=True)

# Any classifier works. This one is trained here for a few seconds; use your trained model instead.
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(8):
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

task = ac.Task(model, loader, (x[val], y[val]), (x[test], y[test]), name="my-digits")
result = ac.tune(task, scheme="StructPrune", max_drop=0.02, trials=3, epochs=8)

print(result.sentence)
print(result.trials[["density", "score", "drop_pp", "feasible"]].to_string(index=False))
for name, measurement in result.measurements.items():
    print(f"{name}: {measurement.params:,} parameters, {measurement.size_bytes / 1e3:.1f} kB")
print(result.model)  # a smaller torch.nn.Module like any other
print(f"Saved in {result.folder / 'best'}")
