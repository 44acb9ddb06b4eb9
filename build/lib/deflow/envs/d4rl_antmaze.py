"""D4RL's antmaze on today's MuJoCo."""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

# The mazes as D4RL lays them out, rows counted in the direction of y; r: start, g: goal of the evaluation.
MAZES = {
    "umaze": ["#####", "#r..#", "###.#", "#g..#", "#####"],
    "medium": ["########", "#r.##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.g#", "########"],
    "large": [
        "############",
        "#r...#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.g.#",
        "############",
    ],
}
CELL = 4.0  # metres from one cell to the next
WALL_HEIGHT = 2.0  # metres
GOAL_RADIUS = 0.5  # metres

TIMESTEP = 0.02  # seconds
FRAME_SKIP = 5  # steps of the simulator an action
TORQUE = 30.0  # Newton metres at an action of 1
CONTACT_IMPEDANCE = (0.8, 0.8, 0.01)  # MuJoCo's solimp: least, greatest, over which depth in metres
START_NOISE = 0.1  # half the width of the positions' uniform one, deviation of the velocities' normal one


class AntMaze(MujocoEnv):
    """An ant that walks from the start of a maze to its goal, with the numbers of D4RL's `antmaze-*-v2`.

    Source: `d4rl/locomotion/{ant,maze_env,goal_reaching_env,wrappers}.py` and `assets/ant.xml` (arXiv 2004.07219).
    Gymnasium's model of the ant has other motors, another time step and harder contacts: they are set to D4RL's.

    An observation is the 15 positions (x, y from the centre of the start cell) and the 14 velocities; an action the
    8 torques in units of 30 Nm. The reward is 1 within 0.5 m of the goal, where the episode ends, and 0 elsewhere;
    a fall ends nothing. Every reset draws the goal anew, up to 1.5 m from the centre of its cell in x and in y;
    `info["success"]` says whether that one is reached.

    Args:
        maze: a key of `MAZES`.
        kwargs: Gymnasium's rendering arguments.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, maze: str, **kwargs: Any) -> None:
        self._grid = np.array([list(row) for row in MAZES[maze]])
        self._goal_cell = self._centres("g")[0]
        space = gymnasium.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", FRAME_SKIP, space, default_camera_config=self._camera(), **kwargs)
        self.goal = self._goal_cell

    def _centres(self, kind: str) -> np.ndarray:
        """x, y of the cells of a kind, from the centre of the start cell: shape (cells, 2), in metres."""
        return CELL * (np.argwhere(self._grid == kind) - np.argwhere(self._grid == "r"))[:, ::-1]

    def _camera(self) -> dict[str, Any]:
        """From above, with the whole maze in view."""
        walls = self._centres("#")
        middle, width = (walls.min(axis=0) + walls.max(axis=0)) / 2, np.ptp(walls[:, 0]) + CELL
        return {"lookat": np.array([*middle, 0.0]), "distance": 1.4 * width, "elevation": -90.0, "azimuth": 90.0}

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        spec = mujoco.MjSpec.from_file(self.fullpath)
        half = [CELL / 2, CELL / 2, WALL_HEIGHT / 2]
        for x, y in self._centres("#"):
            position = [x, y, WALL_HEIGHT / 2]
            spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=half, conaffinity=1)
        place = [*self._goal_cell, 0.0]
        spec.worldbody.add_site(name="goal", pos=place, size=[GOAL_RADIUS] * 3, rgba=[1, 0, 0, 0.7])  # to be seen only
        model = spec.compile()
        model.opt.timestep = TIMESTEP
        model.actuator_gear[:, 0] = TORQUE
        model.geom_solimp[:, :3] = CONTACT_IMPEDANCE
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, self.width), max(buffer.offheight, self.height)
        return model, mujoco.MjData(model)

    def reset_model(self) -> np.ndarray:
        draw = self.np_random
        self.goal = self._goal_cell + draw.uniform(0, 1, 2) + draw.uniform(0, 0.5, 2)
        self.model.site("goal").pos[:2] = self.goal
        positions = self.init_qpos + draw.uniform(-START_NOISE, START_NOISE, self.model.nq)
        mujoco.mj_normalizeQuat(self.model, positions)  # as D4RL's MuJoCo did by itself
        self.set_state(positions, self.init_qvel + START_NOISE * draw.standard_normal(self.model.nv))
        return self.state_vector()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.float64, bool, bool, dict[str, Any]]:
        self.do_simulation(action, self.frame_skip)
        reached = bool(np.linalg.norm(self.get_xy() - self.goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self.state_vector(), np.float64(reached), reached, False, {"success": reached}

    def get_xy(self) -> np.ndarray:
        """Where the ant is, shape (2,), in metres."""
        return self.data.qpos[:2].copy()
