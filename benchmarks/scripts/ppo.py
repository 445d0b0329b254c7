"""PPO on a cart that is to be balanced: actor and critic, epochs of minibatches, clipped ratios and gradients."""

import torch
from torch import nn
from torch.distributions import Categorical

from benchmarks.scripts.planted import Planted

planted = Planted(steps=96)
width = planted.width(32)


class Agent(nn.Module):
    """Actor and critic."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        self.actor = nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )


def move(state, action):
    """One step of carts with poles, as in the textbook; those that have fallen begin anew."""
    x, v, angle, spin = state.unbind(1)
    force = 20.0 * action - 10.0
    push = (force + 0.05 * spin.square() * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    along = push - 0.05 * turn * angle.cos() / 1.1
    state = torch.stack([x + 0.02 * v, v + 0.02 * along, angle + 0.02 * spin, spin + 0.02 * turn], 1)
    fallen = (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.21)
    return torch.where(fallen[:, None], 0.1 * torch.rand_like(state) - 0.05, state), fallen


agent = Agent()
optimizer = torch.optim.Adam(agent.parameters(), planted.rate(1e-3), eps=1e-5)
planted.into(optimizer, agent=agent)
state = 0.1 * torch.rand(8, 4) - 0.05
while planted.now + 1 < planted.steps:
    states, actions, logs, rewards, ends = [], [], [], [], []
    with torch.no_grad():
        for _ in range(32):
            chosen = Categorical(logits=agent.actor(state), validate_args=False)
            action = chosen.sample()
            states, actions, logs = [*states, state], [*actions, action], [*logs, chosen.log_prob(action)]
            state, fallen = move(state, action)
            rewards, ends = [*rewards, 1.0 - fallen.float()], [*ends, fallen]
        back = agent.critic(state)[:, 0]
        returns = []
        for reward, end in zip(rewards[::-1], ends[::-1], strict=True):
            back = reward + 0.98 * torch.where(end, 0.0, back)
            returns.append(back)
    seen, did, was = torch.cat(states), torch.cat(actions), torch.cat(logs)
    goal = torch.cat(returns[::-1])
    for _ in range(2):
        for part in torch.randperm(len(seen)).split(64):
            planted.begin()
            x = planted.batch(seen[part])
            value = agent.critic(x)[:, 0]
            chosen = Categorical(logits=agent.actor(x), validate_args=False)
            gain = goal[part] - value.detach()
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            ratio = (chosen.log_prob(did[part]) - was[part]).exp()
            policy = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            loss = policy + 0.5 * (value - goal[part]).square().mean() - 0.01 * chosen.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
            planted.note(loss)
planted.tell()
