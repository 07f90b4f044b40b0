"Builds the distribution from `settings.ini`, the one home of its metadata."
from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]

pkg = cfg['lib_name']
extras = {k: lines(f'{k}_requirements') for k in ('kernel', 'gssapi', 'spark', 'test', 'dev')}
extras['test'] += extras['kernel']
extras['dev'] += extras['test']

setup(
    name=pkg,
    version=re.search(r'__version__ = "([^"]+)"', (root/pkg/'__init__.py').read_text(encoding='utf-8'))[1],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license=cfg['license'],
    license_files=['LICENSE'],
    python_requires='>=' + cfg['min_python'],
    install_requires=lines('requirements'),
    extras_require=extras,
    packages=find_packages(include=[pkg, pkg + '.*']),
    package_data={pkg: ['kernelspecs/**/*', 'launchers/*', 'static/*']},
    data_files=[('etc/jupyter/jupyter_server_config.d', ['jupyter-config/gateway_provisioners_ssh.json'])],
    entry_points={
        'console_scripts': lines('console_scripts'),
        'jupyter_client.kernel_provisioners': lines('kernel_provisioners'),
        'gateway_provisioners_ssh.load_balancers': lines('load_balancers'),
        'nbdev': [f'{pkg} = {pkg}._modidx:d'],
    },
    classifiers=[
        'Framework :: Jupyter',
        'Intended Audience :: Science/Research',
        'Intended Audience :: System Administrators',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
    ],
    zip_safe=False,
)
