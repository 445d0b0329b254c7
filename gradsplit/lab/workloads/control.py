"""Proximal policy optimisation (Schulman et al. 2017) swings a pendulum up and holds it there.

Batch: (states (batch, 3), torques (batch, 1), log probabilities (batch,) of the torques when they were drawn,
advantages (batch,) of mean 0 and deviation 1, returns (batch,)), all float32. A state is (cos, sin, speed / 8) of an
angle that is 0 above; its reward per step is (1 + cos) / 2 less a small price of speed and torque, so at most 1.

Unlike in other workloads a batch depends on the model: the policy as it is when a rollout's first batch is drawn plays
it. The starts of a rollout and the noise of the torques depend on seed and step alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..task import BATCHES, DATA, MEASURED_2026_11_29, Batch, Task, Workload, evaluating, generator, measured, seeded

ENVIRONMENTS, HORIZON = 64, 64
EPOCHS, PARTS = 4, 4  # each rollout is read four times, in four parts
DISCOUNT, TRACE = 0.97, 0.95
CLIP, VALUE_SHARE = 0.2, 0.5
GRAVITY, SECONDS, TORQUE, FASTEST = 10.0, 0.05, 2.0, 8.0
TEST_STEPS = 200


def moved(angle: Tensor, speed: Tensor, torque: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a pole of mass and length 1: angle and speed after it, and its reward.

    Args:
        angle: radians, 0 above.
        speed: radians a second.
        torque: cut to [-2, 2].

    >>> angle, speed, reward = moved(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    >>> angle.item(), speed.item(), reward.item()                       # above and at rest it stays
    (0.0, 0.0, 1.0)
    """
    torque = torque.clamp(-TORQUE, TORQUE)
    reward = 0.5 * (1 + angle.cos()) - 0.002 * speed.square() - 0.001 * torque.square()
    speed = (speed + SECONDS * (1.5 * GRAVITY * angle.sin() + 3.0 * torque)).clamp(-FASTEST, FASTEST)
    return angle + SECONDS * speed, speed, reward


def _seen(angle: Tensor, speed: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin(), speed / FASTEST], -1)


class ActorCritic(nn.Module):
    """Two perceptrons on the same state: the mean torque, with one learned deviation, and the value."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.actor, self.critic = self._net(hidden), self._net(hidden)
        self.actor_head, self.critic_head = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        self.log_deviation = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.actor_head.weight, std=0.01)

    @staticmethod
    def _net(hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean torques (n, 1) and values (n,)."""
        return self.actor_head(self.actor(states)), self.critic_head(self.critic(states))[..., 0]

    def log_probability(self, mean: Tensor, torques: Tensor) -> Tensor:
        """Of torques (n, 1) under the policy's mean, (n,)."""
        z = (torques - mean) / self.log_deviation.exp()
        return (-0.5 * z.square() - self.log_deviation - 0.5 * math.log(2 * math.pi))[..., 0]


def advantages_of(rewards: Tensor, values: Tensor) -> Tensor:
    """Generalised advantages (Schulman et al. 2016) over time, which no state of a pendulum ends.

    Args:
        rewards: (time, n).
        values: (time + 1, n), the last of the state after the last step.

    >>> round(advantages_of(torch.ones(1, 1), torch.tensor([[0.5], [2.0]])).item(), 4)         # 1 + 0.97 x 2 - 0.5
    2.44
    """
    surprise = rewards + DISCOUNT * values[1:] - values[:-1]
    made, carried = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for at in range(len(rewards) - 1, -1, -1):
        carried = surprise[at] + DISCOUNT * TRACE * carried
        made[at] = carried
    return made


class ControlTask(Task):
    """Hold the pendulum above."""

    model: ActorCritic

    def __init__(self, model: ActorCritic, seed: int) -> None:
        super().__init__(model, seed)
        self._number, self._order = -1, torch.zeros(0)
        self._rollout: Batch = ()

    def draw(self, step: int) -> Batch:
        """A quarter of the present rollout; every sixteenth step plays a new one."""
        number, part = divmod(step, EPOCHS * PARTS)
        if number != self._number:
            source = generator(self.seed, BATCHES, number)
            self._rollout, self._number = self._play(source), number
            total = ENVIRONMENTS * HORIZON
            self._order = torch.cat([torch.randperm(total, generator=source) for _ in range(EPOCHS)])
        size = ENVIRONMENTS * HORIZON // PARTS
        picks = self._order[part * size : (part + 1) * size]
        return tuple(tensor[picks] for tensor in self._rollout)

    @torch.no_grad()
    def _play(self, source: torch.Generator) -> Batch:
        """A rollout of all environments with the policy of now, flattened over time and environments."""
        model = self.model
        angle = math.pi * (2 * torch.rand(ENVIRONMENTS, generator=source) - 1)
        speed = 2 * torch.rand(ENVIRONMENTS, generator=source) - 1
        noise = torch.randn(HORIZON, ENVIRONMENTS, 1, generator=source)
        states, torques, logs, rewards, values = [], [], [], [], []
        for at in range(HORIZON + 1):
            state = _seen(angle, speed)
            mean, value = (part.cpu() for part in model(state.to(self.device)))
            values.append(value)
            if at == HORIZON:
                break
            torque = mean + model.log_deviation.exp().cpu() * noise[at]
            states.append(state)
            torques.append(torque)
            logs.append(model.log_probability(mean.to(self.device), torque.to(self.device)).cpu())
            angle, speed, reward = moved(angle, speed, torque[:, 0])
            rewards.append(reward)
        held = torch.stack(values)
        advantages = advantages_of(torch.stack(rewards), held)
        returns = advantages + held[:-1]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        parts = (torch.stack(states), torch.stack(torques), torch.stack(logs), advantages, returns)
        return tuple(part.flatten(0, 1) for part in parts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The clipped surrogate, plus half the mean square error of the values."""
        states, torques, logs, advantages, returns = batch
        mean, value = model(states)
        ratio = (self.model.log_probability(mean, torques) - logs).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        return VALUE_SHARE * (value - returns).square().mean() - surrogate.mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Give "upright": the mean of (1 + cos) / 2 over ten seconds from 64 starts below, with the mean torque."""
        source = generator(0, DATA, 5)
        angle = math.pi + 0.2 * (2 * torch.rand(ENVIRONMENTS, generator=source) - 1)
        speed, total = torch.zeros(ENVIRONMENTS), torch.zeros(ENVIRONMENTS)
        with evaluating(model):
            for _ in range(TEST_STEPS):
                torque = model(_seen(angle, speed).to(self.device))[0].cpu()
                angle, speed, _ = moved(angle, speed, torque[:, 0])
                total += torch.nan_to_num(0.5 * (1 + angle.cos()))
        return {"upright": min(float(total.mean()) / TEST_STEPS, 1.0)}


def build_control(seed: int = 0, *, hidden: int = 64) -> ControlTask:
    """The control task; see `CONTROL.options`."""
    with seeded(seed):
        model = ActorCritic(hidden)
    return ControlTask(model, seed)


CONTROL = Workload(
    name="control",
    title="PPO swings a pendulum up",
    metric="upright",
    higher_is_better=True,
    steps=960,
    optimizer="adamw",
    lr=1e-3,
    expected=measured(
        0.797, 6, "gradsplit compare control --methods gso --lr usual --schedule linear --seeds 1", MEASURED_2026_11_29
    ),
    data_note="Simulated: 64 pendulums for 64 steps a rollout, 16 updates a rollout; the largest reward per step is 1.",
    build=build_control,
    options={"hidden": "tanh units a layer"},
)
