"""What distill_image_classifier.py is made of: images, models, trainings, report."""
