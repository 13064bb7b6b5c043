"""Atari games under one protocol, however their id is spelled."""

import re

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorWrapper

from common.seeding import stream_seed

PROTOCOL = """Atari protocol: 4 frames a step, maximum of the last two, 84x84 grey, stack of 4; up
to 30 frames of FIRE and no-ops at the start, at most 108,000 a game; a lost life ends the agent's
episode, not the game, and the step after it (with sticky actions also a game's first) presses FIRE,
whatever the action; returns are scores of whole games"""


def find_game(env_id: str) -> str | None:
    """Return ale-py's name of a game, as of `ALE/Breakout-v5` or `BreakoutNoFrameskip-v4`."""
    match = re.fullmatch(r"(ALE/)?([A-Z]\w*?)(NoFrameskip|Deterministic)?-v[045]", env_id)
    if not match:
        return None
    spec = gym.registry.get(env_id)
    if spec is not None and not str(spec.entry_point).startswith("ale_py"):  # a user's own
        return None
    from ale_py import roms

    return {x.title().replace("_", ""): x for x in roms.get_all_rom_ids()}.get(match[2])


class AtariGames(VectorWrapper):
    """Games [N] that step together: ale-py's vector environment under PROTOCOL.

    `terminated` marks a lost life or the end of a game, infos["over"] only the end of a game, also
    by its time limit; rewards are the score. Games are restored as in envs.Replayable.
    """

    def __init__(self, game: str, num_envs: int, seed: int, sticky_actions: float, **options):
        from ale_py.vector_env import AtariVectorEnv

        options = {"noop_max": 30, "max_num_frames_per_episode": 108_000, "stack_num": 4} | options
        options |= {"frameskip": 4, "maxpool": True, "use_fire_reset": True}
        options |= {"autoreset_mode": AutoresetMode.SAME_STEP, "life_loss_info": True}
        options |= {"repeat_action_probability": sticky_actions, "reward_clipping": False}
        self.games, self.seed = AtariVectorEnv(game, num_envs, **options), seed
        super().__init__(self.games)
        meanings = [action.name for action in self.games.ale.get_action_set()]
        self.fire = meanings.index("FIRE") if "FIRE" in meanings else 0
        self.episode, self.actions = np.full(num_envs, -1), [[] for _ in range(num_envs)]
        self.waiting = np.zeros(num_envs, bool)  # for FIRE
        # ale-py loads a game anew to seed it, which takes as long as a hundred steps; without
        # sticky actions only the no-ops at the start are random, and 64 games share a seed
        self.games_per_seed = 1 if sticky_actions else 64

    def reset(self, *, seed: list[int] | None = None, options=None) -> tuple[np.ndarray, dict]:
        """Begin the next game everywhere, by default with its own seed."""
        self.episode += 1
        return self._begin(np.ones(self.num_envs, bool), seed), {}

    def _begin(self, which: np.ndarray, seeds: list[int] | None = None) -> np.ndarray:
        first = self.episode - (0 if seeds else self.episode % self.games_per_seed)
        games = zip(np.flatnonzero(which).tolist(), first[which].tolist())
        seeds = seeds or [stream_seed(self.seed, "env", *game) for game in games]
        seeds = np.array([seed % 2**31 for seed in seeds])
        obs, infos = self.games.reset(seed=seeds, options={"reset_mask": which})
        while (behind := which & (first < self.episode)).any():
            obs, infos = self.games.reset(options={"reset_mask": behind})
            first += behind
        self.frames = infos["episode_frame_number"]
        self.waiting[which] = self.games_per_seed == 1  # a sticky game may have missed ale-py's
        self.actions = [[] if new else played for new, played in zip(which, self.actions)]
        return obs

    def step(self, actions: np.ndarray) -> tuple:
        """Step all games; observations are uint8 [N, 4, 84, 84], newly made."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Let the games begin a step, in threads of their own."""
        actions = np.where(self.waiting & (self.fire > 0), self.fire, actions)
        for played, action in zip(self.actions, actions.tolist()):
            played.append(action)
        self.games.send(actions)

    def step_wait(self) -> tuple:
        """Wait for the step that step_async began, and return what it gave."""
        obs, rewards, terminated, truncated, infos = self.games.recv()
        over = infos["episode_frame_number"] < self.frames  # lives would tell it in most games only
        self.frames, self.waiting = infos["episode_frame_number"], terminated & ~over
        infos = {name: infos[name] for name in ("final_obs",) if name in infos} | {"over": over}
        if over.any():
            self.episode += over
            self.actions = [[] if end else played for end, played in zip(over, self.actions)]
            seeded = over & (self.episode % self.games_per_seed == 0)
            obs = self._begin(seeded) if seeded.any() else obs
        return obs, rewards, terminated, truncated, infos

    def get_attr(self, name: str) -> list:
        """Return `history`, (number of the running game, its actions), or `obs`, of every game."""
        if name == "obs":
            return list(self.obs)
        actions = [np.array(x, np.uint8) for x in self.actions]
        return list(zip(self.episode.tolist(), actions))

    def set_attr(self, name: str, histories: list[tuple[int, np.ndarray] | None]) -> None:
        """Repeat the actions of each `history`; each game begins so that all get there at once.

        They step together, so one that is to stay as it is (None) repeats its own.
        """
        pairs = zip(histories, self.get_attr("history"))
        episodes, played = zip(*(own if x is None else x for x, own in pairs))
        lengths = np.array([len(x) for x in played])
        for left in range(lengths.max(), -1, -1):
            if (begin := lengths == left).any():
                self.episode[begin] = np.array(episodes)[begin]
                self.obs = self._begin(begin)
            if left:
                actions = [int(x[-left]) if left <= len(x) else 0 for x in played]
                self.obs = self.step(np.array(actions))[0]


class AtariGame(gym.Env):
    """One whole game at a time, for evaluation; a twin that plays along draws its real colours."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, game: str, sticky_actions: float, render_mode: str | None):
        seed = np.random.SeedSequence().entropy  # for games that are reset without one
        self.games = [AtariGames(game, 1, seed, sticky_actions)]
        if render_mode:
            colours = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
            self.games.append(AtariGames(game, 1, seed, sticky_actions, **colours))
        self.render_mode = render_mode
        self.observation_space = self.games[0].single_observation_space
        self.action_space = self.games[0].single_action_space

    def reset(self, *, seed: int | None = None, options=None) -> tuple[np.ndarray, dict]:
        """Begin the game that `seed` gives, by default any."""
        obs = [games.reset(seed=None if seed is None else [seed])[0] for games in self.games]
        self.picture = obs[-1][0, 0]
        return obs[0][0], {}

    def step(self, action: int) -> tuple:
        """Step; only the end of the game terminates."""
        steps = [games.step(np.array([action])) for games in self.games]
        drawn, *_, last = steps[-1]
        self.picture = (last["final_obs"] if last["over"][0] else drawn)[0, 0]  # not the next game
        obs, (reward,), _, (truncated,), infos = steps[0]
        return obs[0], float(reward), bool(infos["over"][0] and not truncated), bool(truncated), {}

    def render(self) -> np.ndarray:
        """Return the frame [210, 160, 3]."""
        return self.picture
