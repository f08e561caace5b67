"""Push a trained or converted model to the Hub: weights, configuration and card in one commit.

    python hub/publish.py RUN_FOLDER --repo ORG/NAME [--which best] [--license apache-2.0] [--dry-run FOLDER]

The same as `python -m timm_tinyvit.hub.push_model`.
"""

from timm_tinyvit.hub.push_model import main

if __name__ == '__main__':
    main()
