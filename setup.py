"The requirements live in settings.ini; everything else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def version():
    "The version that `nbdev-bump-version` edits, read without importing the package."
    lines = (Path(__file__).parent/cfg['lib_path']/'__init__.py').read_text(encoding='utf-8').splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith('__version__'))


setup(version=version(), install_requires=cfg['requirements'].split(),
      extras_require={k.removesuffix('_requirements'): v.split()
                      for k, v in cfg.items() if k.endswith('_requirements')})
