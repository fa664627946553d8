"""The training loop and the accuracy are compared with those computed by hand."""

import pytest
import torch

from pyops.data import Split
from pyops.train import accuracy, make_optimizer, train


@pytest.fixture
def data() -> Split:
    return Split(torch.randn(10, 1, 4, 4), torch.arange(10) % 3)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))


def test_two_epochs_are_what_they_are_by_hand(data):
    net, twin = network(), network()
    batches = []
    epochs = list(
        train(
            net,
            make_optimizer(net, "sgd", 0.1),
            data,
            epochs=2,
            batch_size=4,
            seed=7,
            on_batch=lambda count, loss: batches.append((count, loss)),
        )
    )

    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for epoch in range(2):
        order = torch.randperm(10, generator=generator)
        for step, batch in enumerate((order[:4], order[4:8], order[8:])):
            fraction = torch.tensor((3 * epoch + step) / 6)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + torch.cos(torch.pi * fraction).item()) / 2
            scores = twin(data.images[batch])
            loss = torch.nn.functional.cross_entropy(scores, data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = (scores.argmax(1) == data.labels[batch]).sum().item()
            expected.append((len(batch), loss.item(), right))

    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert [count for count, _ in batches] == [4, 4, 2] * 2
    assert [loss for _, loss in batches] == pytest.approx([loss for _, loss, _ in expected])
    for epoch, part in zip(epochs, (expected[:3], expected[3:]), strict=True):
        assert epoch.loss == pytest.approx(sum(count * loss for count, loss, _ in part) / 10)
        assert epoch.accuracy == sum(right for _, _, right in part) / 10
        assert epoch.seconds > 0


def test_default_learning_rates():
    net = network()
    assert make_optimizer(net, "sgd").defaults["lr"] == 0.02
    assert make_optimizer(net, "adam").defaults["lr"] == 0.003
    assert isinstance(make_optimizer(net, "adam", 0.5), torch.optim.Adam)
    assert make_optimizer(net, "adam", 0.5).defaults["lr"] == 0.5


def test_accuracy_counts_in_evaluation_mode():
    class Digit(torch.nn.Module):
        """Classifies the images correctly whose pixel is their label, and none while training."""

        def forward(self, images):
            return torch.nn.functional.one_hot(images.flatten(1)[:, 0].long() + int(self.training), 11).float()

    labels = torch.arange(1300) % 10
    images = labels.clone()
    images[:13] = 9 - images[:13]
    split = Split(images.float().reshape(-1, 1, 1, 1), labels)
    assert accuracy(Digit(), split) == (1300 - 13) / 1300
