"The `ltrl` command as `python -m ltrl_fastai`."
from ltrl_fastai.cli.main import app

if __name__ == '__main__': app(prog_name='python -m ltrl_fastai')
