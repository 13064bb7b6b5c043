"""Atari: one protocol, the three ends of an episode, and games found again exactly."""

import functools
import sys
from types import SimpleNamespace
from unittest import mock

import ale_py.vector_env
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    assert_same,
    assert_same_runs,
    flags,
    kill_after_checkpoint,
    scalars,
)

import ppo_discrete as ppo
from common import arguments, atari, envs
from common.checkpoint import load_checkpoint, save_checkpoint
from common.seeding import stream_seed

NOOP, FIRE, RIGHT, LEFT = range(4)  # Breakout's


def begin(num_envs: int = 1, game: str = "breakout", sticky_actions: float = 0.0, **options):
    """Games that were reset, their first observations, and the lives that ale-py tells at a step."""
    games, lives = atari.AtariGames(game, num_envs, 1, sticky_actions, **options), []
    recv = games.games.recv

    def spy():
        outcome = recv()
        lives.append(outcome[4]["lives"].tolist())
        return outcome

    games.games.recv = spy
    return games, games.reset()[0], lives


def random_actions(games, steps: int) -> list[np.ndarray]:
    games.action_space.seed(1)
    return [games.action_space.sample() for _ in range(steps)]


def play(games, actions) -> list[list]:
    """Observations, rewards, terminated, truncated, over of steps."""
    steps = (games.step(action) for action in actions)
    return [[*step[:4], step[4]["over"]] for step in steps]


def distinct(arrays) -> int:
    return len({x.tobytes() for x in arrays})


def play_until(games, name: str, limit: int = 400) -> tuple[np.ndarray, tuple]:
    """Do nothing until the first game is `over`, or lost a life; the two observations there."""
    obs = None
    for _ in range(limit):
        before, (obs, reward, terminated, truncated, infos) = obs, games.step(np.array([NOOP]))
        if infos["over"][0] if name == "over" else terminated[0]:
            return before, (obs, reward, terminated, truncated, infos)
    raise AssertionError(f"no {name} in {limit} steps")


@pytest.mark.parametrize(
    "env_id, game",
    [
        ("ALE/Breakout-v5", "breakout"),
        ("BreakoutNoFrameskip-v4", "breakout"),
        ("BreakoutDeterministic-v4", "breakout"),
        ("Breakout-v4", "breakout"),
        ("ALE/MsPacman-v5", "ms_pacman"),
        ("ALE/UpNDown-v5", "up_n_down"),
        ("Pendulum-v1", None),
        ("HalfCheetah-v4", None),
        ("my:Breakout-v5", None),
        ("ALE/Nope-v5", None),
    ],
)
def test_games_are_known_however_they_are_spelled(env_id, game):
    assert atari.find_game(env_id) == game


def test_every_game_that_ale_py_registers_is_found():
    gym.register_envs(__import__("ale_py"))
    games = {s.id: s.kwargs["game"] for s in gym.registry.values() if s.namespace == "ALE"}
    assert len(games) > 100 and games == {env_id: atari.find_game(env_id) for env_id in games}


def test_a_users_environment_that_is_called_as_a_game_is_no_game(monkeypatch):
    assert atari.find_game("Tetris-v0") == "tetris"
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)
    gym.register("Tetris-v0", lambda: None)
    assert atari.find_game("Tetris-v0") is None and atari.find_game("ALE/Tetris-v5") == "tetris"


def test_both_spellings_play_the_same():
    seen = []
    for env_id in ("ALE/Breakout-v5", "BreakoutNoFrameskip-v4"):
        args = ppo.Args(env_id=env_id, num_envs=3)
        obs_space, action_space = envs.check_spaces(args, gym.spaces.Discrete, "")
        environments = envs.Environments(args)
        assert obs_space.shape == (4, 84, 84) and obs_space.dtype == np.uint8
        assert action_space == gym.spaces.Discrete(4)
        assert environments.obs.shape == (3, 4, 84, 84) and environments.obs.dtype == np.uint8
        steps = [environments.step(np.full(3, t // 5 % 4)) for t in range(40)]
        seen.append([environments.obs, *([*step[:4], step[4]["over"]] for step in steps)])
    assert_same(*seen)
    assert distinct(seen[0][0]) == 3  # each its own no-ops


def test_each_game_has_a_seed_of_its_own():
    seeds = {}
    for run in (1, 2):
        games = atari.AtariGames("breakout", 3, run, 0.0)
        with mock.patch.object(games.games, "reset", wraps=games.games.reset) as reset:
            games.reset()
        seeds[run] = reset.call_args_list[0].kwargs["seed"].tolist()
        assert seeds[run] == [stream_seed(run, "env", i, 0) % 2**31 for i in range(3)]
    assert len({*seeds[1], *seeds[2]}) == 6


@pytest.mark.parametrize("game", ["breakout", "space_invaders"])
def test_games_equal_a_bare_emulator_under_the_protocol(game):
    """FIRE and up to 30 no-ops, four frames a step, the brighter of the last two, FIRE after a lost
    life in Breakout; whole pictures, not made smaller.
    """
    pictures = {"img_height": 210, "img_width": 160, "stack_num": 1}
    games, obs, _ = begin(16, game, **pictures)
    starts, actions = games.frames.tolist(), random_actions(games, 120)
    assert 1 <= min(starts) < 5 and 25 < max(starts) <= 31
    steps = play(games, actions)
    for n in range(4):
        ale, lost = ale_py.ALEInterface(), 0
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path(game))
        ale.reset_game()
        moves = ale.getMinimalActionSet()
        for action in [moves[FIRE]] + [moves[NOOP]] * (starts[n] - 1):
            ale.act(action)
        assert np.array_equal(ale.getScreenGrayscale(), obs[n, 0])
        press_fire = False
        for action, (picture, reward, *_) in zip(actions, steps):
            score, screens, lives = 0, [], ale.lives()
            for _ in range(4):
                score += ale.act(moves[FIRE if press_fire else action[n]])
                screens.append(ale.getScreenGrayscale())
            assert score == reward[n]
            if ale.game_over():  # the picture is of the next game
                break
            assert np.array_equal(np.maximum(*screens[2:]), picture[n, 0])
            press_fire = ale.lives() < lives
            lost += press_fire
    assert lost > 0 or game != "breakout"


def test_games_end_after_108000_frames(monkeypatch):
    made, make = [], ale_py.vector_env.AtariVectorEnv

    def spy(*args, **options):
        made.append(options["max_num_frames_per_episode"])
        return make(*args, **options)

    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", spy)
    begin()
    assert made == [108_000]


def test_observations_are_newly_made():
    games, obs, _ = begin(2)
    kept = [obs, *(step[0] for step in play(games, random_actions(games, 20)))]
    copies = [x.copy() for x in kept]
    play(games, random_actions(games, 20))
    assert_same(kept, copies)


def test_actions_are_not_sticky_unless_asked():
    """Without no-ops at the beginning, a seed decides over nothing else."""
    for sticky_actions, kinds in ((0.0, 1), (0.25, 4)):
        games, *_ = begin(4, sticky_actions=sticky_actions, noop_max=1)
        rng = np.random.default_rng(0)
        steps = play(games, [np.full(4, rng.integers(4)) for _ in range(60)])
        assert distinct(np.stack([obs for obs, *_ in steps], axis=1)) == kinds
    args = ppo.Args(env_id="ALE/Breakout-v5", sticky_actions=0.25)
    alone = envs.make_env(args, "rgb_array").games  # what is seen, and what is drawn
    for games in (envs.Environments(args).vector_env, *alone):
        assert games.games_per_seed == 1  # as with sticky actions


def test_rewards_are_the_score():
    """In points, a dozen at once in some games; whole games add up."""
    games, *_ = begin(2, "asterix")
    steps = play(games, random_actions(games, 100))
    rewards = np.array([rewards for _, rewards, *_ in steps])
    assert rewards.max() == 50 and set(np.unique(rewards)) == {0, 50}


def test_a_lost_life_ends_the_agents_episode_but_not_the_game():
    games, _, lives = begin()
    before, (obs, _, terminated, truncated, infos) = play_until(games, "life")
    assert terminated.all() and not truncated.any() and not infos["over"].any()
    assert [x[0] for x in lives[-2:]] == [5, 4] and games.episode == [0]
    assert np.array_equal(obs[:, :3], before[:, 1:])  # the stack goes on, here
    after, *_, over = play(games, [np.array([LEFT])])[0]
    assert np.array_equal(after[:, :3], obs[:, 1:]) and not over.any()  # and in the next step


def test_the_step_after_a_lost_life_presses_fire_whatever_the_action():
    (games, *_), (explicit, *_), (without, *_) = (begin() for _ in range(3))
    for x in (games, explicit, without):
        play_until(x, "life")
    without.waiting[:] = False
    rest = [np.array([a]) for a in (RIGHT, RIGHT, LEFT) * 4]
    got = play(games, [np.array([NOOP]), *rest])
    assert_same(got, play(explicit, [np.array([FIRE]), *rest]))
    other = play(without, [np.array([NOOP]), *rest])  # no ball
    assert not np.array_equal(got[-1][0], other[-1][0])
    ((_, actions),) = games.get_attr("history")
    assert actions[-13:].tolist() == [FIRE, RIGHT, RIGHT, LEFT, *[RIGHT, RIGHT, LEFT] * 3]


def test_a_game_without_fire_takes_the_action_itself():
    games, *_ = begin(game="asterix")
    play_until(games, "life")
    play(games, [np.array([5]), np.array([6])])
    assert games.get_attr("history")[0][1][-2:].tolist() == [5, 6]


def test_the_end_of_a_game_begins_another_that_can_be_found_again():
    games, first, lives = begin()
    before, (obs, _, terminated, truncated, infos) = play_until(games, "over")
    assert terminated.all() and not truncated.any() and infos["over"].all()
    counts = [x[0] for x in lives]
    assert counts == sorted(counts[:-1], reverse=True) + [5] and set(counts) == {5, 4, 3, 2, 1}
    assert np.array_equal(infos["final_obs"][0][:3], before[0, 1:])
    assert games.episode == [1] and len(games.get_attr("history")[0][1]) == 0
    fresh, *_ = begin()  # the second game from that seed
    fresh.set_attr("history", games.get_attr("history"))
    assert np.array_equal(fresh.get_attr("obs")[0], obs[0]) and not np.array_equal(obs, first)
    games.episode[0] = 31
    with mock.patch.object(games.games, "reset", wraps=games.games.reset) as reset:
        play_until(games, "over")
    assert games.episode == [32] and not reset.called
    games.episode[0] = 63  # the next has a seed of its own
    _, (obs, *_) = play_until(games, "over")
    assert games.episode == [64]
    fresh = atari.AtariGames("breakout", 1, 99, 0.0)
    assert np.array_equal(fresh.reset(seed=[stream_seed(1, "env", 0, 64)])[0], obs)
    # and with sticky actions every one
    games = atari.AtariGames("breakout", 1, 1, 0.25)
    games.reset()
    _, (obs, *_) = play_until(games, "over")
    fresh = atari.AtariGames("breakout", 1, 99, 0.25)
    assert np.array_equal(fresh.reset(seed=[stream_seed(1, "env", 0, 1)])[0], obs)
    # and only the game that is over begins anew
    games, *_ = begin(2)
    for t in range(400):
        action = np.array([NOOP, t % 4])
        before, (obs, *_, infos) = games.frames, games.step(action)
        if infos["over"].any():
            break
    assert infos["over"].sum() == 1
    assert (games.frames - before)[~infos["over"]] == 4 and games.frames[infos["over"]] < 60


def test_a_time_limit_truncates_with_the_real_last_observation():
    limited, *_ = begin(2, max_num_frames_per_episode=400)
    endless, *_ = begin(2)
    actions = random_actions(limited, 101)
    steps = play(limited, actions[:99])
    assert_same(steps, play(endless, actions[:99]))
    obs, _, terminated, truncated, infos = limited.step(actions[99])
    real, _, real_terminated, real_truncated, _ = endless.step(actions[99])
    assert truncated.all() and infos["over"].all() and not terminated.any()
    assert not real_terminated.any() and not real_truncated.any()  # this game would have gone on
    final = np.stack(infos["final_obs"])
    assert np.array_equal(final[:, :3], real[:, :3])
    different = [(final[:, 3] != x[:, 3]).mean() for x in (real, obs)]
    assert different[0] < 0.01 < different[1]  # ale-py leaves the limit's very last frame out
    assert limited.episode.tolist() == [1, 1]
    assert not play(limited, actions[100:])[0][-1].any()


def test_evaluation_ends_at_the_time_limit(monkeypatch):
    games = functools.partial(atari.AtariGames, max_num_frames_per_episode=400)
    monkeypatch.setattr(atari, "AtariGames", games)
    game = atari.AtariGame("pong", 0.0, None)
    game.reset(seed=5)
    ends = [game.step(0)[2:4] for _ in range(100)]
    assert [x for x in ends if any(x)] == [(False, True)]


def test_training_tells_the_three_ends_apart(monkeypatch):
    """In storage, in value targets and in the scores logged, against games that play along."""

    class Limited(atari.AtariGames):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, max_num_frames_per_episode=720)

    monkeypatch.setattr(atari, "AtariGames", Limited)
    twin, obs, _ = begin(4, "berzerk")
    estimate, scores, lengths = ppo.estimate, np.zeros(4), np.zeros(4, int)
    seen, logged = {"life": 0, "over": 0, "limit": 0}, []

    def spy(agent, rollout, values, args):
        nonlocal obs
        _, targets = result = estimate(agent, rollout, values, args)
        nexts, rewards = [], []
        for t, action in enumerate(rollout.actions):
            assert np.array_equal(rollout.obs[t], obs) and rollout.obs.dtype == torch.uint8
            assert rollout.obs[t].is_contiguous(memory_format=torch.channels_last)
            obs, reward, terminated, truncated, infos = twin.step(action)
            over, truncated = infos["over"], truncated & ~terminated
            assert rollout.rewards[t].tolist() == np.sign(reward).tolist()
            assert rollout.terminations[t].tolist() == terminated.tolist()
            assert rollout.truncations[t].tolist() == truncated.tolist()
            nexts.append(obs.copy())
            for n in np.flatnonzero(truncated):
                nexts[-1][n] = infos["final_obs"][n]
            seen["life"] += (terminated & ~over).sum()
            seen["over"] += (terminated & over).sum()
            seen["limit"] += (truncated & over).sum()
            rewards.append(reward)
            scores[:], lengths[:] = scores + reward, lengths + 1
            for n in np.flatnonzero(over):
                logged.append((scores[n], lengths[n]))
                scores[n], lengths[n] = 0, 0
        future = agent(torch.from_numpy(np.concatenate(nexts)))[1].numpy()
        expected = np.sign(rewards).ravel() + args.gamma * future * ~rollout.terminations.ravel()
        np.testing.assert_allclose(targets, expected, rtol=1e-3, atol=1e-3)
        return result

    monkeypatch.setattr(ppo, "estimate", spy)
    options = {"num_envs": 4, "num_steps": 100, "num_minibatches": 2, "update_epochs": 1}
    options |= {"clip_reward": True, "gae_lambda": 0.0, "hidden_sizes": (), "eval_episodes": 1}
    args = ppo.Args(env_id="ALE/Berzerk-v5", total_timesteps=2400, compile=False, **options)
    tags = scalars(ppo.train(args))
    pairs = zip(tags["charts/episodic_return"], tags["charts/episodic_length"])
    assert [(score, length) for (_, score), (_, length) in pairs] == logged
    assert min(seen.values()) > 0 and max(logged)[0] > 50


def test_sticky_games_do_not_begin_without_fire():
    """A quarter of them would miss the one that ale-py presses, and evaluations stand still."""
    games, *_ = begin(8, sticky_actions=0.25)
    lost = [step[2] for step in play(games, [np.full(8, NOOP)] * 60)]
    assert np.any(lost, axis=0).all()  # there was a ball


def test_sticky_games_are_found_again_exactly():
    games, *_ = begin(2, sticky_actions=0.25)
    actions = random_actions(games, 260)
    assert np.any([step[4] for step in play(games, actions[:200])])
    again, *_ = begin(2, sticky_actions=0.25)
    again.set_attr("history", games.get_attr("history"))
    assert_same(play(again, actions[200:]), play(games, actions[200:]))


def test_games_are_found_again_exactly(tmp_path):
    """Games of different ages, one of them just begun, one that waits for FIRE; across their ends."""
    args = ppo.Args(env_id="ALE/Breakout-v5", num_envs=2)
    first, second = envs.Environments(args), envs.Environments(args)
    first.vector_env.action_space.seed(1)
    saved = set()
    for _ in range(500):
        terminated, *_, infos = first.step(first.vector_env.action_space.sample())[2:]
        first.finished_episodes()
        kind = "over" if infos["over"].any() else "life" if terminated.any() else "amid"
        if kind in saved or first.lengths.min() == first.lengths.max():
            continue
        saved.add(kind)
        save_checkpoint(tmp_path / kind, first.state_dict())
        second.step(np.array([LEFT, RIGHT]))  # elsewhere by now
        second.finished_episodes()
        second.load_state_dict(load_checkpoint(tmp_path / kind))
        assert_same(first.state_dict(), second.state_dict())
        assert not second.lost.any()
        actions, ends = random_actions(first.vector_env, 300), 0
        for got, want in zip(play(second, actions), play(first, actions), strict=True):
            assert_same(got, want)
            ends += want[-1].sum()
        assert ends > 0 and second.finished_episodes() == first.finished_episodes()
    assert saved == {"over", "life", "amid"}
    # the history alone, into games that were never played
    fresh, _, _ = begin(2)
    fresh.set_attr("history", first.vector_env.get_attr("history"))
    assert np.array_equal(fresh.get_attr("obs"), first.obs)
    assert_same(play(fresh, actions), play(first, actions))
    obs, *_ = play(fresh, actions[:1])[-1]
    history = fresh.get_attr("history")
    fresh.set_attr("history", [(0, history[0][1][:5]), None])  # the other stays where it was
    assert [len(actions) for _, actions in fresh.get_attr("history")] == [5, len(history[1][1])]
    assert np.array_equal(fresh.get_attr("obs")[1], obs[1])


def test_evaluation_plays_whole_games():
    """Only the end of the game terminates; the same seed gives the same game."""
    games = []
    for seed in (5, 5, 6):
        game = atari.AtariGame("breakout", 0.0, None)
        obs, _ = game.reset(seed=seed)
        steps, lost = [obs], 0
        while len(steps) == 1 or not steps[-1][2]:
            obs, reward, terminated, truncated, _ = game.step(np.int64(len(steps) // 3 % 4))
            assert obs.shape == (4, 84, 84) and type(reward) is float and not truncated
            lost += bool(game.games[0].waiting[0])
            steps.append((obs, reward, terminated))
        assert lost == 4 and game.games[0].episode[0] == 1
        games.append(steps)
        assert np.array_equal(game.reset(seed=seed)[0], steps[0])  # whatever was played before
    assert_same(games[0], games[1])
    assert not np.array_equal(games[0][0], games[2][0])


def test_evaluation_counts_the_score_as_it_is():
    game = envs.make_env(SimpleNamespace(env_id="ALE/Asterix-v5"))
    assert game.reset(seed=0)[0].shape == (4, 84, 84)
    rng = np.random.default_rng(0)
    rewards = [game.step(rng.integers(9))[1] for _ in range(100)]
    assert set(rewards) == {0.0, 50.0}


def test_games_without_a_seed_differ_and_their_pictures_are_theirs():
    games = [atari.AtariGame("breakout", 0.0, "rgb_array") for _ in range(8)]
    for game in games:
        game.reset()
    starts = [[x.frames[0] for x in game.games] for game in games]
    assert all(shown == drawn for shown, drawn in starts)
    assert len({shown for shown, _ in starts}) > 1


def test_evaluation_renders_the_same_game_in_colour():
    game = atari.AtariGame("breakout", 0.0, "rgb_array")
    obs, _ = game.reset(seed=5)
    rng, over = np.random.default_rng(0), False
    pictures = []
    while not over:
        seen, drawn = game.games
        assert seen.frames == drawn.frames and seen.actions == drawn.actions
        picture = game.render()
        assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
        assert (picture[..., 0] != picture[..., 2]).any()  # colours
        grey = torch.from_numpy(picture @ np.array([0.299, 0.587, 0.114]))[None]
        small = torch.nn.functional.adaptive_avg_pool2d(grey, (84, 84))[0].numpy()
        assert np.abs(small - obs[-1]).mean() < 2
        pictures.append(picture.copy())
        obs, _, over, *_ = game.step(rng.integers(4))
    assert distinct(pictures) > len(pictures) / 2
    last = game.render().astype(int)  # of this game, not the next
    assert np.abs(last - pictures[-1]).mean() < 0.5 * np.abs(last - pictures[0]).mean()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Breakout-v5"])
def test_evaluation_is_shown_in_a_window(monkeypatch, env_id):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    seen = []

    def act(obs):
        surface = pygame.display.get_surface()
        seen.append(surface and pygame.surfarray.array3d(surface))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return np.int64(len(seen) % 2)

    with pytest.raises(KeyboardInterrupt):
        envs.play(act, ppo.Args(env_id=env_id, render=True), None)
    pygame.quit()
    assert all(x is not None and x.std() > 1 for x in seen)


def test_evaluation_is_filmed(tmp_path):
    pytest.importorskip("moviepy")
    args = ppo.Args(env_id="ALE/Breakout-v5", capture_video=True, eval_episodes=1)
    returns, lengths = envs.play(lambda obs: np.int64(LEFT), args, tmp_path)
    assert (tmp_path / "videos" / "evaluation-0-episode-0.mp4").stat().st_size > 1000
    plain = SimpleNamespace(**vars(args) | {"capture_video": False})
    assert envs.play(lambda obs: np.int64(LEFT), plain, tmp_path) == (returns, lengths)


SMALL = {"env_id": "ALE/Breakout-v5", "num_envs": 2, "num_steps": 16, "num_minibatches": 2}
SMALL |= {"update_epochs": 1, "compile": False, "eval_episodes": 1, "total_timesteps": 640}
SMALL |= {"num_threads": 1, "checkpoint_every": 192}


def test_killed_and_resumed_ends_as_if_never_stopped_and_is_evaluated_alike(run, tmp_path):
    """With lives lost and games over on both sides of the kills."""
    words = flags(**SMALL | {"total_timesteps": 960, "checkpoint_every": 96})
    trained = run("ppo_discrete.py", *words, "--run-dir", "whole", cwd=tmp_path).stdout
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    words = [*words, "--run-dir", "killed"]
    for _ in range(2):
        assert kill_after_checkpoint(run, "ppo_discrete.py", words, checkpoint, cwd=tmp_path)
        words = ["--resume", "killed"]
    assert 0 < load_checkpoint(checkpoint)["global_step"] < 960
    run("ppo_discrete.py", *words, cwd=tmp_path)
    assert_same_runs(tmp_path / "whole", tmp_path / "killed", "best.pt")
    assert len(scalars(tmp_path / "whole")["charts/episodic_return"]) >= 2
    line = run("ppo_discrete.py", "--evaluate", "killed", cwd=tmp_path).stdout
    assert line.startswith("evaluation of 1 episodes") and line in trained


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--env-id ALE/Pong-v5", (10_000_000, 8, 0.1, True, ())),
        ("--env_id PongNoFrameskip-v4", (10_000_000, 8, 0.1, True, ())),
        ("--num-envs 3 --no-clip-reward --env-id=ALE/Pong-v5", (10_000_000, 3, 0.1, False, ())),
        ("--env-id ALE/Pong-v5 --clip-coef 0.2 --hidden-sizes 32", (10**7, 8, 0.2, True, (32,))),
        ("--env-id Acrobot-v1", (500_000, 4, 0.2, False, (64, 64))),
        ("", (500_000, 4, 0.2, False, (64, 64))),
    ],
)
def test_atari_has_defaults_of_its_own_and_what_is_given_wins(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *words.split()])
    args, _ = arguments.parse_args(ppo.Args, ppo.SCRIPT, ppo.ATARI)
    got = args.total_timesteps, args.num_envs, args.clip_coef, args.clip_reward, args.hidden_sizes
    assert got == expected and args.learning_rate == 2.5e-4
